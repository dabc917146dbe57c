"""The commands that say what there is, the help, and what is said while work is done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.cuda import device as cuda_device
from latentrt.engines.files import locked
from latentrt.engines.progress import silent
from latentrt.runtime.cli import env, progress, run
from latentrt.runtime.cli.errors import GLOBAL_OPTIONS
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.catalog import SAMPLERS
from latentrt.runtime.sampling.registry import names

COMMANDS = [
    "generate",
    "serve",
    "export",
    "quantize",
    "build",
    "inspect",
    "triton-repository",
    "verify",
    "samplers",
    "backends",
    "plan",
    "env",
    "cache",
    "bench",
]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["cache"], ["bench"]])
def test_a_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    text = output(capsys, *arguments)
    assert text == output(capsys, *arguments, "--help")
    assert text.startswith("Usage: ") and "Commands:" in text


def test_the_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)
    assert re.findall(r"^  ([a-z-]+)  ", text.partition("Commands:")[2], re.MULTILINE) == COMMANDS
    assert "..." not in text.partition("Commands:")[2]
    assert "0 done, 1 failed, 2 bad usage or request, 130 interrupted" in text
    assert "--install-completion" in text and "--show-completion" in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_the_help_of_a_command_ends_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = output(capsys, command, "--help")
    assert re.search(r"\n  Example: .*latentrt \w+", text)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"latentrt \d+\.\d+\.\d+\S*\n", output(capsys, "--version"))


def test_a_shell_completes_commands() -> None:
    asked = {"_LATENTRT_COMPLETE": "complete_bash", "COMP_WORDS": "latentrt sa", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "latentrt.runtime"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["samplers"], "")


@pytest.mark.parametrize(
    "words", [["generate", "--help"], ["samplers"], ["--version"], ["genrate"], ["cache", "path"]], ids=" ".join
)
def test_a_command_loads_no_other(words: list[str]) -> None:
    """What a command does not use is not read either: the first picture waits for nothing."""
    code = f"import sys\nfrom latentrt.runtime.cli import run\nrun({words!r})\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands = {name.replace("-", "_") for name in COMMANDS} | {"bundle", "serving"}
    loaded = {name for name in commands if f"latentrt.runtime.cli.{name}" in done.stdout.split("\n")[-2].split()}
    used = {"generate": {"generate"}, "samplers": {"env", "bundle"}, "cache": {"cache", "bundle"}}
    assert loaded == used.get(words[0], set())


def test_a_word_that_is_no_command_is_told_those_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["genrate"]) == 2
    assert "No such command 'genrate'. Did you mean 'generate'?" in capsys.readouterr().err


def test_every_sampler_is_listed_with_suffixes_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "samplers", "--json"))
    assert [sampler["name"] for sampler in found] == names()
    for sampler in found:
        assert sampler["class_name"] in SAMPLERS and 10 < len(sampler["meaning"]) < 90
        assert re.search(r"\((.+ 20\d\d|k-diffusion)\)|as diffusers has it", sampler["meaning"]), sampler["name"]
        for suffix in sampler["suffixes"]:
            assert len(step_table({}, 5, sampler=f"{sampler['name']}_{suffix}")) >= 5
    text = output(capsys, "samplers")
    found = r"^dpmpp_2m\* +DPMSolverMultistepScheduler +DPM-Solver\+\+ multistep, order 2 \(Lu et al. 2022\)$"
    assert re.search(found, text, re.MULTILINE)
    assert all(f" {name}" in text for name in SAMPLERS)
    assert len(text.splitlines()) == len(names()) + 2


def test_every_backend_is_listed_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "backends", "--json"))
    assert list(found) == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu", "openvino"]
    assert found["onnxruntime-cuda"]["options"]["gpu"]["default"] == 0
    assert set(found["onnxruntime-cpu"]["options"]) == {"threads"}
    assert all(backend["unavailable"] is None or len(backend["unavailable"]) > 10 for backend in found.values())
    text = output(capsys, "backends")
    assert re.search(r"^    threads +number: .+$", text, re.MULTILINE)
    assert re.search(r"^    build +yes or no: .+ \(default: yes\)$", text, re.MULTILINE)


def test_env_names_every_backend_and_why_it_does_not_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    report = json.loads(output(capsys, "env", "--json"))
    assert report["backends"]["onnxruntime-cpu"] is None
    assert all(reason is None or len(reason) > 10 for reason in report["backends"].values())
    assert report["latentrt_home"] == report["cache"] == str(tmp_path)
    text = output(capsys, "env")
    assert "backend onnxruntime-cpu: works" in text and f"LATENTRT_HOME {tmp_path}" in text


def test_env_shows_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, compute_capability, driver_version = "NVIDIA Thing", "8.9", "13.0"

        def __init__(self, number: int) -> None:
            self.number = number

        def memory_free(self) -> tuple[int, int]:
            return 1 << 30, 8 << 30

        def close(self) -> None: ...

    class Driver:
        def cuDeviceGetCount(self) -> int:
            return 1

    assert hasattr(cuda_device.CudaDevice, "memory_free") and hasattr(cuda_device.CudaDevice, "compute_capability")
    monkeypatch.setattr(env, "unavailable_reason", lambda: None)
    monkeypatch.setattr(env, "load_driver", Driver)
    monkeypatch.setattr(env, "CudaDevice", Gpu)
    text = output(capsys, "env")
    assert re.search(r"^GPU 0: NVIDIA Thing, compute capability 8.9, 8.00 GiB, driver .+, CUDA up to 13.0$", text, re.M)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """A cache with an old and a new engine."""
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    cache = EngineCache()
    for name, days, key in [
        ("decoder", 40, {"backend": "onnxruntime-cpu", "cpu": "Some CPU fpu sse", "onnxruntime": "1.31.1"}),
        (
            "denoiser",
            1,
            {
                "backend": "tensorrt-rtx",
                "version": "1.2",
                "target": {"compute_capability": "8.9"},
                "profile": {"context": [[1, 2], [1, 2], [1, 2]]},
            },
        ),
    ]:

        def build(folder: Path) -> dict[str, Any]:
            (folder / "model").write_bytes(bytes(2048))
            return {}

        when = time.time() - days * 24 * 3600
        os.utime(cache.get(name, key, build) / SIDECAR, (when, when))
    return cache


def test_the_cache_is_listed(engines: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "cache", "list").splitlines()
    assert re.fullmatch(r"denoiser +tensorrt-rtx +2\.\d+ KiB +24 hours  8\.9, version 1\.2, context 1x2", lines[0])
    assert re.fullmatch(r"decoder +onnxruntime-cpu +2\.\d+ KiB +40 days  Some CPU, onnxruntime 1\.31\.1", lines[1])
    assert lines[2].startswith("2 engines, 4.") and lines[2].endswith(str(engines.root))
    found = json.loads(output(capsys, "cache", "list", "--json"))
    assert [engine["graph"] for engine in found] == ["denoiser", "decoder"]
    assert output(capsys, "cache", "path").strip() == str(engines.root.parent)


def test_bundles_in_the_cache_are_listed_behind_the_engines(
    engines: EngineCache, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engines.root.parent / "bundles" / "mine-fp32-0123"
    shutil.copytree(tiny_sd15_bundle, folder)
    broken = engines.root.parent / "bundles" / "broken-fp32-0123"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    lines = output(capsys, "cache", "list").splitlines()
    assert len(lines) == 6 and lines[2].startswith("2 engines") and lines[5].startswith("2 bundles, ")
    assert {line.split()[0] for line in lines[3:5]} == {"bundle"}
    assert any("mine-fp32-0123" in line and "cannot" not in line for line in lines[3:5])
    assert any("cannot be read" in line and "broken-fp32-0123" in line for line in lines[3:5])
    found = json.loads(output(capsys, "cache", "list", "--json"))
    assert [each["graph"] for each in found] == ["denoiser", "decoder", "bundle", "bundle"]


def test_a_bundle_that_is_removed_meanwhile_is_not_listed(
    engines: EngineCache, tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engines.root.parent / "bundles" / "mine-fp32-0123"
    shutil.copytree(tiny_sd15_bundle, folder)
    is_file = Path.is_file

    def removed_once_it_is_seen(path: Path) -> bool:
        found = is_file(path)
        if folder in path.parents and folder.exists():
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(Path, "is_file", removed_once_it_is_seen)
    lines = output(capsys, "cache", "list").splitlines()
    assert len(lines) == 3 and lines[2].startswith("2 engines") and not folder.exists()


def test_an_engine_that_is_removed_meanwhile_is_no_error(
    engines: EngineCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = EngineCache.entries

    def removed_once_it_is_listed(cache: EngineCache) -> list[dict[str, Any]]:
        found = listed(cache)
        for entry in found:
            cache.remove(entry)
        return found

    monkeypatch.setattr(EngineCache, "entries", removed_once_it_is_listed)
    assert output(capsys, "cache", "list").splitlines()[-1].startswith("2 engines")
    assert output(capsys, "cache", "list").splitlines()[-1].startswith("0 engines")


def test_old_engines_are_pruned(engines: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "cache", "prune", "--older-than", "30", "--dry-run")
    assert text.startswith("decoder") and "would remove 2." in text and len(engines.entries()) == 2
    assert "removed 2." in output(capsys, "cache", "prune", "--older-than", "30")
    assert [entry["graph"] for entry in engines.entries()] == ["denoiser"]
    output(capsys, "cache", "prune", "--all")
    assert engines.entries() == [] and not list((engines.root / ".building").glob("*"))


def test_an_engine_that_another_builds_stays(engines: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    kept = next(entry["folder"] for entry in engines.entries() if entry["graph"] == "denoiser")
    with locked(engines.root / ".locks" / kept.name):
        assert "denoiser" in output(capsys, "cache", "prune", "--all")
    assert [entry["folder"] for entry in engines.entries()] == [kept]


def test_build_says_what_it_built_and_where(
    tiny_sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    arguments = ["build", str(tiny_sd15_bundle), "--backend", "onnxruntime-cpu"]
    first, again = output(capsys, *arguments).splitlines(), output(capsys, *arguments).splitlines()
    pattern = r"\w+ every size onnxruntime-cpu: {}, [\d.]+ \w+ in " + re.escape(str(tmp_path)) + r"/\S+"
    assert all(re.fullmatch(pattern.format(r"[\d.]+ s"), line) for line in first)
    assert all(re.fullmatch(pattern.format("was there"), line) for line in again)
    found = json.loads(output(capsys, *arguments, "--json"))
    assert {Path(each["folder"]) for each in found} == {entry["folder"] for entry in EngineCache().entries()}
    assert len(first) == len(again) == len(found) == 5


def test_stages_are_said_once_the_work_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.set_verbosity()
    for patience, expected in ((1e6, ""), (0.0, "latentrt: exporting: denoiser\nlatentrt: exporting: decoder\n")):
        monkeypatch.setattr(progress, "PATIENCE", patience)
        with progress.progress_bar("exporting") as report:
            assert isinstance(report, progress._Lines)
            report("denoiser", 1, 2)
            if not patience:
                report._timer.join()
            for stage in ("denoiser", "decoder", "decoder"):
                report(stage, 2, 2)
        assert capsys.readouterr().err.removeprefix("latentrt: exporting\n") == expected


def test_quiet_has_no_progress() -> None:
    progress.set_verbosity(quiet=True)
    with progress.progress_bar("exporting") as report:
        assert report is silent
    progress.set_verbosity()


def test_a_global_option_behind_the_command_is_told_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    for option in GLOBAL_OPTIONS:
        assert run(["env", option]) == 2
        assert re.search(r"error: --?\w+ stands before the command: latentrt --?\w+ env", capsys.readouterr().err)
