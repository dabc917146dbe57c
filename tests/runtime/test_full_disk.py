"""Disks that hold no more, wherever something is written: one line with advice, nothing half-written, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, StorageError
from latentrt.runtime.cli import run

pytest.importorskip("onnxruntime")

LIMITED = """
import resource, sys
from latentrt.runtime.cli import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""
"""A process whose files may have so many bytes: of more, the system says what it says of a user's full share."""

REQUEST = ["--quiet", "generate", "a star", "--steps", "1", "--size", "64x64", "--seed", "1"]


@pytest.fixture(scope="module", autouse=True)
def engines(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the engines in the cache: what is tested is what is written after them."""
    assert run([*REQUEST, "-o", str(tmp_path_factory.mktemp("drawn") / "a.png")]) == 0


def limited(limit: int, *arguments: str, home: Path | None = None) -> tuple[int, str, str]:
    environment = os.environ | ({} if home is None else {"LATENTRT_HOME": str(home)})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="limits are POSIX's")
def test_an_engine_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """ONNX Runtime writes the file, and says only that it could not."""
    code, _, err = limited(20_000, *REQUEST, "-o", str(tmp_path / "a.png"), home=tmp_path / "home")
    root = tmp_path / "home" / "engines"
    advice = "free space, or set LATENTRT_HOME to another folder"
    assert (code, err) == (
        1,
        f"latentrt: error: cannot write the engine cache {root} ({os.strerror(errno.EFBIG)}): {advice}\n",
    )
    assert not (tmp_path / "a.png").exists()
    assert list((root / ".building").iterdir()) == [] and EngineCache(root).entries() == []


@pytest.mark.skipif(os.name == "nt", reason="limits are POSIX's")
@pytest.mark.parametrize("output", ["a.png", "out"])
def test_a_picture_that_does_not_fit_leaves_what_was_there(tmp_path: Path, output: str) -> None:
    (tmp_path / "a.png").write_bytes(b"before")
    code, out, err = limited(1000, *REQUEST, "-o", str(tmp_path / output))
    assert code == 1 and out == "" and err.count("\n") == 1
    assert f"cannot write {tmp_path / output}" in err and "free space or choose another place" in err
    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted({"a.png", output})


def test_pictures_are_named_although_their_grid_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrt.runtime.cli import generate

    def full(*_: Any) -> None:
        raise StorageError("cannot write grid.png: No space left on device")

    monkeypatch.setattr(generate, "write_atomically", full)
    monkeypatch.chdir(tmp_path)
    for as_json in ([], ["--json"]):
        assert run([*REQUEST, "-o", "out", "--grid", "grid.png", *as_json]) == 1
        out, err = capsys.readouterr()
        (path,) = [entry["path"] for entry in json.loads(out)["images"]] if as_json else [out.split()[0]]
        assert (tmp_path / path).stat().st_size and "grid.png: No space left" in err


def test_a_build_that_failed_for_another_reason_says_that(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        raise EngineError("graph denoiser cannot be built")

    with pytest.raises(EngineError, match="cannot be built"):
        EngineCache(tmp_path).get("denoiser", {}, fail)
