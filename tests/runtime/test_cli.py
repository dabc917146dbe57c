"""What the commands print and write when all is well."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import FORMAT_VERSION, Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.tensorrt.backend import plan_options
from latentrt.runtime.cli import run
from latentrt.runtime.cli.options import options_of
from latentrt.runtime.loop.workspace import Workspace
from latentrt.runtime.pictures.png import TEXT_KEY
from PIL import Image

PROMPT = "a red circle on a blue background"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentrt.runtime.cli.progress.PATIENCE", 1e6)  # no lines of progress on a slow machine
    return tmp_path


def test_pictures_are_written_with_seeds_in_their_names(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--steps", "1", "--count", "2", "--seed", "41"]
    assert run(arguments) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["latentrt-0001-seed41.png", "latentrt-0002-seed42.png"]
    assert capsys.readouterr().out.splitlines() == [
        f"latentrt-0001-seed41.png  seed 41  {PROMPT}",
        f"latentrt-0002-seed42.png  seed 42  {PROMPT}",
    ]


def test_a_cancelled_request_keeps_the_pictures_of_finished_batches(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run_batch = Workspace.run

    def interrupted(workspace: Workspace, steps: int, *arguments: Any, **options: Any) -> Any:
        ran.append(steps)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run_batch(workspace, steps, *arguments, **options)

    monkeypatch.setattr(Workspace, "run", interrupted)
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--steps", "1", "--count", "6", "--seed", "41"]
    assert run(arguments) == 130
    assert sorted(p.name[-6:] for p in folder.iterdir()) == ["41.png", "42.png", "43.png", "44.png"]
    captured = capsys.readouterr()
    assert captured.err == "latentrt: error: interrupted\n"
    assert [line.split()[0] for line in captured.out.splitlines()] == sorted(p.name for p in folder.iterdir())


def test_options_of_the_backend_are_taken_by_name(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int | None] = []
    init = OnnxRuntimeCpu.__init__

    def noted(backend: OnnxRuntimeCpu, *, threads: int | None = None, **options: Any) -> None:
        made.append(threads)
        init(backend, threads=threads, **options)

    monkeypatch.setattr(OnnxRuntimeCpu, "__init__", noted)
    arguments = ["generate", PROMPT, "--bundle", str(tiny_sd15_bundle), "--steps", "1", "--json"]
    assert run([*arguments, "--backend", "onnxruntime-cpu", "--option", "threads=1"]) == 0
    assert made == [1]
    report = json.loads(capsys.readouterr().out)
    assert set(report["memory"]) == {"encode", "denoise", "decode"}
    assert run([*arguments, "--option", "threads=0"]) == 2
    assert run([*arguments, "--threads", "1", "--option", "threads=1"]) == 2
    assert run([*arguments, "--threads", "999"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("latentrt: error: threads is 0") and "threads was given twice" in lines[1]
    assert "threads is 999: this machine has" in lines[2]


def test_options_are_of_the_type_that_the_backend_declares() -> None:
    from latentrt.engines.onnxruntime.cuda import OnnxRuntimeCuda
    from latentrt.engines.tensorrt.backend import TensorRt

    given = ["weights_on_gpu=1.5G", "scratch=500MiB", "optimization_level=4", "hardware=ampere_plus", "build=no"]
    assert options_of(TensorRt, "tensorrt", given) == {
        "weights_on_gpu": 1_500_000_000,
        "scratch": 500 << 20,
        "optimization_level": 4,
        "hardware": "ampere_plus",
        "build": False,
    }
    assert options_of(OnnxRuntimeCuda, "onnxruntime-cuda", ["graphs=onnxruntime"]) == {"graphs": "onnxruntime"}


def test_an_option_that_is_given_twice_is_refused() -> None:
    from latentrt.engines.onnxruntime.cuda import OnnxRuntimeCuda

    with pytest.raises(RequestError, match="option graphs is given twice: give it once"):
        options_of(OnnxRuntimeCuda, "onnxruntime-cuda", ["graphs=onnxruntime", "graphs=none"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("level=5", r"tensorrt has no option 'level': it has gpu, build, weights_on_gpu"),
        ("gpu", r"option is 'gpu': give NAME=VALUE"),
        ("gpu=one", r"option gpu is 'one': input should be a valid integer"),
        ("cache=x", r"tensorrt has no option 'cache'"),
    ],
)
def test_a_bad_option_is_named(text: str, message: str) -> None:
    from latentrt.engines.tensorrt.backend import TensorRt

    with pytest.raises(RequestError, match=message):
        options_of(TensorRt, "tensorrt", [text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization_level": 6}, "optimization_level is 6: give 0"),
        ({"scratch": 0}, "scratch is 0"),
        ({"hardware": "all"}, "hardware is 'all': choose ampere_plus"),
        ({"weights_on_gpu": -1}, "weights_on_gpu is -1"),
    ],
)
def test_a_plan_s_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_options(**options)


def test_prompts_come_from_standard_input_or_a_file_and_a_grid_shows_them(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"\ufeff{PROMPT}\n\n  a star  \n"  # as editors on Windows begin a file
    common = ["--bundle", str(tiny_sd15_bundle), "--steps", "1", "--json", "--seed", "1", "--grid", "grid.png"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "cp1252"))  # not the console's
    assert run(["generate", "-", *common, "-o", "a"]) == 0
    first = json.loads(capsys.readouterr().out)
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    assert run(["generate", "--prompts", "prompts.txt", *common, "-o", "b"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert [entry["prompt"] for entry in first["images"]] == [PROMPT, "a star"]
    assert {"open", "encode", "denoise", "decode", "write", "total"} <= set(first["timings"])
    for one, two in zip(first["images"], second["images"], strict=True):
        assert Path(one["path"]).read_bytes() == Path(two["path"]).read_bytes()
    sheet, single = Image.open("grid.png"), Image.open(first["images"][0]["path"])
    assert sheet.width > 2 * single.width and sheet.height > single.height


def test_an_initial_picture_and_a_mask_are_used(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save("init.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    arguments = ["generate", PROMPT, "-b", str(tiny_sd15_bundle), "--steps", "2", "--init-image", "init.png", "-s", "1"]
    assert run([*arguments, "--strength", "0.5", "-o", "a.png"]) == 0
    assert run([*arguments, "--mask", "mask.png", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_inspect_shows_graphs_tensors_and_hashes(tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_sd15_bundle)]) == 0
    out = capsys.readouterr().out
    for word in ("denoiser", "context", "float32", "sha256", "PNDMScheduler", "every file matches its hash"):
        assert word in out
    assert "prediction epsilon," in out and "prompt of 77 tokens" in out
    assert run(["inspect", "--json", str(tiny_sd15_bundle)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == {} and report["manifest"]["format_version"] == FORMAT_VERSION


def test_one_picture_goes_to_standard_output(
    folder: Path, tiny_sd15_bundle: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    common = ["generate", PROMPT, "-b", str(tiny_sd15_bundle), "--steps", "1", "-s", "1"]
    assert run([*common, "-o", "-"]) == 0
    png = capfdbinary.readouterr().out
    assert run([*common, "-o", "a.png"]) == 0
    assert png == Path("a.png").read_bytes() and [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_new_folder_may_have_a_dot_in_its_name(folder: Path, tiny_sd15_bundle: Path) -> None:
    arguments = ["generate", PROMPT, "-b", str(tiny_sd15_bundle), "--steps", "1", "-s", "1", "-o", "sd1.5-pics"]
    assert run(arguments) == 0
    assert [path.name for path in Path("sd1.5-pics").iterdir()] == ["latentrt-0001-seed1.png"]


def test_a_picture_says_which_bundle_and_checkpoint_drew_it(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_sd15_bundle, "mine")
    assert run(["generate", PROMPT, "-b", "mine", "--steps", "1", "-o", "a.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["request"]
    held = json.loads(Image.open("a.png").text[TEXT_KEY])  # type: ignore[attr-defined]
    source = Bundle.open(tiny_sd15_bundle).manifest.source["name"]
    for request in (told, held):
        assert (request["bundle"], request["checkpoint"]) == ("mine", source)
