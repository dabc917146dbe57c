"""What differs from system to system, pretended here: consoles, users without a home, processes without `/proc`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines import machine
from latentrt.engines.host import HostDevice
from latentrt.runtime.cli import run


def test_a_console_without_unicode_gets_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Windows console that is redirected holds not every prompt or path."""
    pytest.importorskip("onnxruntime")
    out, err = (io.TextIOWrapper(io.BytesIO(), "cp1252") for _ in "oe")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    picture = tmp_path / "圆.png"
    assert run(["generate", "a красный circle", "--steps", "1", "--size", "64x64", "-o", str(picture)]) == 0
    assert picture.stat().st_size
    out.flush()
    shown = out.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined]
    assert r"\u5706.png" in shown and r"\u043a" in shown
    assert run(["generate", "a", "--init-image", "圆/absent.png"]) == 2
    err.flush()
    assert rb"--init-image \u5706/absent.png does not exist" in err.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["samplers"], ["--version"], ["generate", "--help"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "latentrt.runtime", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    message = b"latentrt: error: No space left on device: free space or choose another place\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_what_is_installed_is_said_to_a_user_without_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LATENTRT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert run(["env"]) == 0
    said = capsys.readouterr().out
    assert "no cache: this user has no home folder for the cache: set LATENTRT_HOME to a folder" in said
    assert "numpy" in said and "backend onnxruntime-cpu" in said
    assert run(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cache"] is None and "set LATENTRT_HOME" in report["cache_error"] and report["engines"] == 0


def test_prompts_from_standard_input_are_utf8_or_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "cp1252"))
    assert run(["generate", "-"]) == 2
    assert "standard input cannot be read as UTF-8 text" in capsys.readouterr().err


def test_a_machine_that_tells_nothing_of_its_processors_still_has_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """macOS and Windows: no affinity, no `/proc`, no `/sys`."""
    absent = tmp_path / "absent"
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.usable_cores(absent, absent) == os.cpu_count()
    assert machine.physical_cores(absent, absent, absent) == os.cpu_count()
    monkeypatch.setattr(machine, "_cpuinfo", dict)
    assert machine.processor_name() and machine.processor_identity()


def test_memory_is_counted_by_tensors_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Any = os.open

    def without_proc(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return int(opened(path, *arguments, **options))

    monkeypatch.setattr(os, "open", without_proc)
    device = HostDevice()
    tensor = device.empty((4, 4), "float32")
    assert device.bytes_taken() == device.tensor_bytes() == 64
    tensor.close()
