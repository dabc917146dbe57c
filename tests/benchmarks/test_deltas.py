"""What modes cost on a list of prompts: names, intervals, and the command with a tiny CLIP."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.quality import deltas, scores
from latentrt.engines.bundle import Bundle, write_manifest
from latentrt.engines.errors import CheckpointError, MissingExtraError, RequestError
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import cli


@pytest.mark.parametrize(
    ("text", "backend", "options", "request_"),
    [
        ("taylor", "auto", {}, {"forecast": "taylor"}),
        ("openvino-bf16", "openvino", {"precision": "bf16"}, {}),
        ("onnxruntime-cpu+guidance-kept", "onnxruntime-cpu", {}, {"guidance_reuse": 0.5}),
        ("openvino-bf16+spectrum", "openvino", {"precision": "bf16"}, {"forecast": "spectrum"}),
    ],
)
def test_a_mode_by_its_name(text: str, backend: str, options: dict[str, Any], request_: dict[str, Any]) -> None:
    assert deltas.mode_named(text) == deltas.Mode(backend, options, request_)


@pytest.mark.parametrize("text", ["", "fast", "openvino+fast", "cuda-bf16", "+taylor"])
def test_other_names_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(RequestError, match=f"mode '{text}' is not known: choose taylor, spectrum".replace("+", r"\+")):
        deltas.mode_named(text)


def test_the_interval_is_that_of_the_normal_distribution() -> None:
    differences = np.random.default_rng(1).normal(0.3, 2.0, 400)
    found, error = deltas.change(differences), 1.96 * differences.std() / 20
    assert found.mean == pytest.approx(differences.mean())
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((error, error), rel=0.1)
    assert deltas.change(np.full(5, 0.25)) == deltas.Change(0.25, 0.25, 0.25)


def test_costs_are_paired_by_picture(clip_folder: Path) -> None:
    clip = scores.ClipFeatures(clip_folder)
    rng, prompts = np.random.default_rng(0), ["a circle", "a star", "a ring"]
    exact, other = ([rng.integers(0, 256, (40, 32, 3), np.uint8) for _ in prompts] for _ in range(2))
    same, moved = deltas.costs({"same": exact, "moved": other}, exact, prompts, scores.paired(clip=clip, pick=clip))
    assert same.near.psnr is None and set(same.changes.values()) == {deltas.Change(0, 0, 0)}
    means = [scores.scores(pictures, prompts, pick=clip)["pick_score"] for pictures in (exact, other)]
    assert moved.changes["pick_score"].mean == pytest.approx(means[1] - means[0], abs=1e-6) != 0
    assert moved.changes["pick_score"].low < moved.changes["pick_score"].mean < moved.changes["pick_score"].high


def test_the_command_shows_a_row_for_each_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clip_folder: Path,
) -> None:
    asked = []

    def draw(bundle: Path, prompts: list[str], steps: int, seed: int, **mode: Any) -> list[np.ndarray]:
        asked.append((steps, seed, mode))
        return [np.full((40, 32, 3), 100 + (3 if mode else 0), np.uint8) for _ in prompts]

    checked: list[dict[str, Any]] = []
    monkeypatch.setattr(scores, "draw", draw)
    monkeypatch.setattr(scores, "check", lambda *given, **mode: checked.append(mode))
    (tmp_path / "prompts").write_text("a circle\na star\n")
    command = ["bench", "quality", "bundle", "--prompts", str(tmp_path / "prompts"), "--steps", "30", "--seed", "7"]
    assert cli.run([*command, "--modes", "taylor,openvino-bf16", "--clip", str(clip_folder)]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0]] == ["", "PSNR", "worst", "SSIM", "HaarPSI", "pixels", "clip_score Δ"]
    assert [row[0].strip() for row in rows[2:]] == ["≈ taylor", "≈ openvino-bf16"]
    assert [row[1].strip() for row in rows[2:]] == [f"{20 * np.log10(255 / 3):.1f}"] * 2
    assert [call[:2] for call in asked] == [(30, 7)] * 3
    assert asked[0][2] == {} and asked[1][2]["request"] == {"forecast": "taylor"}
    assert checked == [mode for *_, mode in asked[1:]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--modes", "taylor", "--inception", "x.pth"], "--inception scores one list of pictures"),
        (["--clip", "x", "--lpips", "x.pth"], "--lpips is a distance to the exact run"),
        (["--modes", "fast"], "mode 'fast' is not known"),
        (["--clip", "x", "--reference", "x.npz"], "--reference is for the FID of --inception: give both"),
        (["--modes", "taylor", "--reference", "x.npz"], "--reference is for the FID of --inception: give both"),
        ([], "no score was asked for"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    (tmp_path / "prompts").write_text("a circle\n")
    assert cli.run(["bench", "quality", "bundle", "--prompts", str(tmp_path / "prompts"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("tiny-decoder", "with --tiny-decoder"),
        ("onnxruntime-cpu+taylor", "a forecast needs steps that are linear"),
    ],
)
def test_a_mode_that_cannot_be_drawn_is_told_before_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str, said: str
) -> None:
    monkeypatch.setattr(scores, "draw", lambda *_, **__: pytest.fail("a picture was drawn"))
    (tmp_path / "prompts").write_text("a circle\na star\n")
    bundle = shutil.copytree(BUNDLE, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    ancestral = {**manifest.scheduler, "_class_name": "EulerAncestralDiscreteScheduler"}
    write_manifest(bundle, manifest.model_copy(update={"scheduler": ancestral}))
    command = ["bench", "quality", str(bundle), "--prompts", str(tmp_path / "prompts"), "--steps", "20"]
    assert cli.run([*command, "--modes", f"guided-half,{mode}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_missing_package_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clip_folder: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtraError, match=r"latentrt\[quality\]"):
        deltas.lpips_distance(tmp_path / "alexnet.pth")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"latentrt\[quality\]"):
        scores.ClipFeatures(clip_folder)


def test_lpips_of_local_weights(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch, models = pytest.importorskip("torch"), pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    rng = np.random.default_rng(0)
    a, b = ([rng.integers(0, 256, (64, 64, 3), np.uint8)] for _ in range(2))
    distance = deltas.lpips_distance(tmp_path / "alexnet.pth")
    assert distance(a, a) == 0 and distance(a, b) > 0
    (tmp_path / "none.pth").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="holds no AlexNet"):
        deltas.lpips_distance(tmp_path / "none.pth")
