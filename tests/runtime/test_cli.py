"""What the commands print and write when all is well."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from latentrt.runtime.cli import run
from PIL import Image

PROMPT = "a red circle on a blue background"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
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


def test_prompts_come_from_standard_input_or_a_file_and_a_grid_shows_them(
    folder: Path, tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{PROMPT}\n\n  a star  \n"
    common = ["--bundle", str(tiny_sd15_bundle), "--steps", "1", "--json", "--seed", "1", "--grid", "grid.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run(["generate", "-", *common, "-o", "a"]) == 0
    first = json.loads(capsys.readouterr().out)
    (folder / "prompts.txt").write_text(text)
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
    assert run(["inspect", "--json", str(tiny_sd15_bundle)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == {} and report["manifest"]["format_version"] == 1


def test_env_names_every_backend_and_why_it_does_not_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["onnxruntime-cpu"] is None
    assert all(reason is None or len(reason) > 10 for reason in report["backends"].values())
    assert run(["env"]) == 0
    assert "backend onnxruntime-cpu: works" in capsys.readouterr().out
