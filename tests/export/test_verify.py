from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from latentrt.engines.bundle import MANIFEST, Bundle, write_manifest
from latentrt.engines.errors import BackendUnavailableError, BundleError, CheckpointError, EngineError, RequestError
from latentrt.export import layers
from latentrt.export.compare import compare
from latentrt.export.embedded import BUNDLE
from latentrt.export.layers import layer_errors
from latentrt.runtime.cli import run
from safetensors.numpy import load_file, save_file

GRAPHS = ["text_encoder", "denoiser", "decoder", "image_encoder"]


def test_compare_measures_known_differences() -> None:
    reference = np.array([3.0, 4.0])
    report = compare("x", reference * 1.1, reference, bound=0.2)
    assert report.max_abs_error == pytest.approx(0.4)
    assert report.relative_error == pytest.approx(0.1)
    assert report.cosine == pytest.approx(1.0)
    assert report.within and not compare("x", reference * 1.3, reference, bound=0.2).within
    assert not compare("x", np.array([3.0, np.nan]), reference, bound=0.2).within


@pytest.mark.filterwarnings("ignore")
def test_a_bundle_verifies_against_its_own_checkpoint(
    tiny_sd15_bundle: Path, tiny_sd15_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_sd15_bundle), "--against", str(tiny_sd15_checkpoint), "--steps", "3", "--threads", "1"]
    assert run(["verify", *arguments, "--json", "--layers", "text_encoder"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["within"] and report["backend"] == "onnxruntime-cpu"
    assert {t["tensor"].split(".")[0] for t in report["tensors"]} == set(GRAPHS)
    assert len(report["request"]["steps"]) == 4  # PNDM evaluates one step more
    assert report["request"]["max_pixel_difference"] <= 2
    assert report["layers"]


@pytest.mark.filterwarnings("ignore")
def test_another_checkpoint_is_past_the_bound_and_the_wrong_graph_is_named(
    tiny_sd15_bundle: Path, tiny_sd15_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sd15_checkpoint, other)
    (weights,) = (other / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * np.float32(1.05)
    save_file(tensors, weights)
    arguments = ["verify", str(tiny_sd15_bundle), "--against", str(other), "--steps", "3", "--threads", "1"]
    assert run(arguments) == 1
    assert "was exported from 'tiny-sd15', and unet/diffusion_pytorch_model.safetensors of 'other'" in (
        capsys.readouterr().err
    )
    assert run([*arguments, "--any-checkpoint"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "past the bound" in line).split()[0] == "denoiser.prediction"
    assert lines[-1] == "past a bound"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_layer_of_every_graph_agrees_with_unoptimized_onnx_runtime(tiny_sd15_bundle: Path, graph: str) -> None:
    found = layer_errors(Bundle.open(tiny_sd15_bundle), graph, "onnxruntime-cpu")
    assert len(found) > 5
    assert all(layer.nan_count == 0 and layer.relative_error < 1e-4 for layer in found)


def test_unknown_graphs_and_backends_are_named(tiny_sd15_bundle: Path) -> None:
    bundle = Bundle.open(tiny_sd15_bundle)
    with pytest.raises(BundleError, match="no graph 'unet'"):
        layer_errors(bundle, "unet", "onnxruntime-cpu")
    with pytest.raises(BackendUnavailableError, match="tensorrt-rtx"):
        layer_errors(bundle, "decoder", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unet"], "has no graph 'unet'"),
        (["step"], "graph step is no network, with sizes of its own (H, P, K, G, D): choose text_encoder, deno"),
        (["decoder", "--backend", "openvino"], "backend openvino cannot be compared layer by layer: choose onnx"),
        (
            ["decoder", "--backend", "onnxruntime-cuda", "--option", "tf32=true"],
            "--layers runs the backend with",
        ),
    ],
)
def test_what_has_no_layers_to_compare_is_told_before_anything_is_drawn(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latentrt.benchmarks.quality.drift.drift", lambda *_, **__: pytest.fail("a picture was drawn"))
    assert run(["verify", str(BUNDLE), "--layers", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_layers_that_the_reference_cannot_run_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(shutil.copytree(BUNDLE, tmp_path / "bundle")).manifest
    graphs = tuple(g.model_copy(update={"precision": "bf16"}) for g in manifest.graphs)
    write_manifest(tmp_path / "bundle", manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(RequestError, match="graph decoder computes in bf16, and it is compared with onnxruntime-cpu"):
        layer_errors(Bundle.open(tmp_path / "bundle"), "decoder", "onnxruntime-cpu")
    monkeypatch.setattr(layers, "_infer", lambda *_: onnxruntime.InferenceSession(b"no model"))
    with pytest.raises(EngineError, match="graph text_encoder cannot be compared layer by layer: ") as caught:
        layer_errors(Bundle.open(BUNDLE), "text_encoder", "onnxruntime-cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_bundle_is_refused_although_its_engines_are_cached(
    tiny_sd15_bundle: Path, tiny_sd15_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(tiny_sd15_bundle, tmp_path / "bundle")
    (damaged / "decoder.onnx").write_bytes((damaged / "decoder.onnx").read_bytes()[:-1])
    assert run(["verify", str(damaged), "--against", str(tiny_sd15_checkpoint)]) == 1
    assert "decoder.onnx" in capsys.readouterr().err


def test_a_hub_id_is_opened_at_the_revision_that_the_bundle_was_exported_from(
    tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def opened(source: str, revision: str | None, **_: Any) -> None:
        asked.append((source, revision))
        raise CheckpointError("enough")

    monkeypatch.setattr("latentrt.export.verify.open_checkpoint", opened)
    bundle = shutil.copytree(tiny_sd15_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest["source"] |= {"name": "org/model", "revision": "c0ffee"}
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    for words in (["org/model"], ["org/model", "--revision", "v2"], ["org/other"], ["a.file", "--base", "org/model"]):
        assert run(["verify", str(bundle), "--against", *words]) in (1, 2)
    assert asked == [("org/model", "c0ffee"), ("org/model", "v2"), ("org/other", None), ("a.file", "c0ffee")]
    capsys.readouterr()
    assert run(["verify", str(bundle), "--against", str(tmp_path), "--revision", "v2"]) == 2
    assert "--revision is for hub ids" in capsys.readouterr().err
