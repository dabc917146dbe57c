"""A bundle against its own exact run: what an engine that is off by a known factor shows, and a lossy request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.quality import drift as module
from latentrt.benchmarks.quality.drift import drift
from latentrt.engines.bundle import MANIFEST, Bundle, GraphInfo, Quantization
from latentrt.engines.device import Stream, Tensor
from latentrt.engines.engine import BoundEngine, Shapes
from latentrt.engines.errors import BundleError
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.export.compare import Bounds, told
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.cli import run


class _Scaled:
    def __init__(self, bound: BoundEngine, output: Tensor) -> None:
        self.bound, self.output = bound, output

    def enqueue(self, stream: Stream) -> None:
        self.bound.enqueue(stream)
        self.output.write(self.output.read(stream) * np.float32(1.01), stream)


class ScaledDenoiser(OnnxRuntimeCpu):
    """ONNX Runtime with a denoiser that gives 1.01 times what it should."""

    can_capture = False

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OnnxRuntimeEngine:
        engine = super().open(bundle, graph, shapes)
        if graph.name == "denoiser":
            bind = engine.bind

            def scaled(tensors: Mapping[str, Tensor]) -> BoundEngine:
                return _Scaled(bind(tensors), tensors["prediction"])

            engine.bind = scaled  # type: ignore[method-assign]
        return engine


@pytest.fixture(scope="module")
def embedded() -> Path:
    return ensure_bundle()


def test_the_exact_backend_does_not_drift(embedded: Path) -> None:
    report = drift(embedded, backend="onnxruntime-cpu", steps=2, threads=1)
    assert {t.tensor.partition(".")[0] for t in report.tensors} == {"text_encoder", "denoiser", "decoder"}
    assert all(t.relative_error == 0 for t in report.tensors)
    assert report.request is not None and report.request.psnr is None and report.request.steps == [0, 0]
    assert report.within and report.against == "its own run on onnxruntime-cpu in fp32" and report.options == {}
    assert report.left_out == {"image_encoder": "the request does not run it"}


def test_a_graph_that_is_off_is_named_with_the_error_that_it_adds(
    embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_backend", lambda name, **options: ScaledDenoiser(**options))
    report = drift(embedded, steps=3, threads=1)
    errors = {t.tensor: t.relative_error for t in report.tensors}
    assert errors.pop("denoiser.prediction") == pytest.approx(0.01, rel=1e-4)
    assert set(errors.values()) == {0.0}  # each graph reads what it read in the exact run
    assert [t.tensor for t in report.tensors if not t.within] == ["denoiser.prediction"] and not report.within
    assert report.request is not None and report.request.steps[-1] > 1e-3 and report.request.psnr


def test_the_bound_is_that_of_the_coarsest_that_takes_part(embedded: Path) -> None:
    whole = Bundle.open(embedded).manifest
    half, brain = (whole.model_copy(update={"precision": name}) for name in ("fp16", "bf16"))
    found = [
        Bounds(whole, options={}),
        Bounds(whole, options={"tf32": True}),
        Bounds(whole, half, options={}),
        Bounds(half, whole, options={"precision": "f32"}),
        Bounds(whole, options={"precision": "bf16"}),
        Bounds(brain, options={"precision": "f16"}),
    ]
    bounds = [(each.error("denoiser"), each.psnr()) for each in found]
    assert bounds == [(1e-3, 45), (3e-2, 35), (3e-2, 35), (3e-2, 35), (1e-1, 30), (1e-1, 30)]


@pytest.mark.parametrize(
    ("lost", "psnr", "error", "least"),
    [(0.011, 45.2, 0.25, 15), (0.4, 14.0, 0.6, 10.478), (0.1, None, 0.25, 15), (0.9, 3.0, 0.75, 10)],
)
def test_a_network_in_8_bits_may_lose_more_than_its_manifest_says(
    embedded: Path, lost: float, psnr: float | None, error: float, least: float
) -> None:
    manifest = Bundle.open(embedded).manifest
    said: dict[str, Any] = {"precision": "int8", "layers": 9, "kept": (), "tool": "x", "samples": 4}
    quantization = Quantization(**said, relative_error=lost, psnr=psnr)
    graphs = tuple(
        graph.model_copy(update={"quantization": quantization} if graph.name == "denoiser" else {})
        for graph in manifest.graphs
    )
    other = manifest.model_copy(update={"graphs": graphs})
    for sides in ((other, manifest), (manifest, other), (other,), (other, other)):
        bounds = Bounds(*sides, options={})
        found = (0.25, 15) if sides == (other, other) else (pytest.approx(error), pytest.approx(least, abs=1e-3))
        assert (bounds.error("denoiser"), bounds.psnr()) == found  # the same on both sides is no difference of theirs
        assert bounds.error("decoder") == 1e-3
    assert told(other, {"threads": 2, "tf32": True}) == {"denoiser": "int8", "tf32": True}


def test_two_models_are_told_apart_before_anything_is_drawn(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Pipeline", lambda *given, **named: pytest.fail("a picture was drawn"))
    other = shutil.copytree(embedded, tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text(encoding="utf-8"))
    (denoiser,) = (graph for graph in manifest["graphs"] if graph["name"] == "denoiser")
    denoiser["inputs"][2]["shape"][2] = 768
    (other / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    message = rf"context of graph denoiser is \['R', 'L', 768\] in {other} and .*: give two bundles of one model"
    with pytest.raises(BundleError, match=message):
        drift(embedded, exact=other, threads=1)


def test_a_lossy_request_is_compared_with_the_whole_run(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(embedded), "--backend", "onnxruntime-cpu", "--threads", "1", "--steps", "10"]
    assert run([*command, "--forecast", "taylor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(t["relative_error"] == 0 for t in report["tensors"])
    assert report["options"] == {"forecast": "taylor"} and report["request"]["bound"] is None
    assert len(report["request"]["steps"]) == 1 and 1e-4 < report["request"]["steps"][0] < 0.5
    assert 15 < report["request"]["psnr"] < 70 and report["request"]["haarpsi"] < 1
    assert run([*command[:-1], "1"]) == 0
    assert "\nimage_encoder is not compared: the request does not run it\n" in capsys.readouterr().out


def test_options_that_do_not_go_together_are_refused(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(embedded), "--vae", "other"]) == 2
    assert "--vae is about a checkpoint: give the checkpoint with --against" in capsys.readouterr().err
    assert run(["verify", str(embedded), "--against", "org/name", "--guidance-reuse", "0.5"]) == 2
    assert "--guidance-reuse is compared with an exact run: leave out --against" in capsys.readouterr().err


@pytest.mark.long
def test_an_fp16_bundle_is_compared_with_the_fp32_one_and_with_no_other_model(
    tiny_sd15_bundle: Path, tiny_sd15_fp16_bundle: Path, embedded: Path
) -> None:
    report = drift(tiny_sd15_fp16_bundle, exact=tiny_sd15_bundle, backend="onnxruntime-cpu", steps=2, threads=1)
    errors = {t.tensor: t.relative_error for t in report.tensors}
    assert report.within and 1e-5 < errors["denoiser.prediction"] < 3e-2
    assert report.against == f"the run of {tiny_sd15_bundle} on onnxruntime-cpu in fp32"
    with pytest.raises(BundleError, match="give two bundles of one model"):
        drift(embedded, exact=tiny_sd15_bundle, threads=1)
