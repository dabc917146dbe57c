"""The embedded model with its denoiser taken apart draws what it draws whole, in every way that a request runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.quality import drift as drifts
from latentrt.benchmarks.quality.drift import drift
from latentrt.engines.bundle import Bundle, describe_files, write_manifest
from latentrt.export.embedded import ensure_bundle
from latentrt.export.layers import layer_errors
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.loop.hoisted import MODULATION, at_one_step
from latentrt.runtime.shapes import requested_shapes

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 5, "output_type": "latent"}
TWO: dict[str, Any] = {"prompt": ["a red circle", "two green stars"], "num_images_per_prompt": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded bundle with what its denoiser became; a prompt counts as of few tokens."""
    from latentrt.export.graph import Graph
    from latentrt.export.passes.parts import write_parts

    whole = Bundle.open(ensure_bundle())
    folder = shutil.copytree(whole.path, tmp_path_factory.mktemp("hoisted") / "bundle")
    info = whole.graph("denoiser")
    graph = Graph(info.name, info.stage, torch.nn.Identity(), info.inputs, info.outputs, info.limits, usual={"L": 8})
    parts = write_parts(graph, ir.load(whole.file(info.files[0])), folder, "fp32")
    parts = [p if p.name == MODULATION else p.model_copy(update={"parity": info.parity}) for p in parts]
    for reference in info.references:
        (folder / reference.file).unlink()
    graphs = [p for g in whole.manifest.graphs for p in (parts if g.name == "denoiser" else [g])]
    write_manifest(folder, whole.manifest.model_copy(update={"graphs": tuple(graphs), "files": describe_files(folder)}))
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.open(folder, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole() -> Iterator[Pipeline]:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as opened:
        yield opened


def close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_denoiser_is_taken_apart(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert [g.name for g in manifest.graphs if g.stage in ("request", "step")] == [
        *("prompt", "schedule", "modulation", "denoiser", "step")
    ]
    read = [spec.name for spec in Bundle.open(folder).graph("denoiser").inputs]
    assert "context" not in read and "timestep" not in read
    assert manifest.bytes_of("request") > 0
    whole = Bundle.open(ensure_bundle()).manifest
    assert manifest.bytes_of("step") < whole.bytes_of("step")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"height": 64, "width": 96, **TWO},
        {"sampler": "dpmpp_2m", "num_inference_steps": 17, "guidance_scale": 1.0},
        {"sampler": "euler_a", "negative_prompt": "blurry"},
        {"guidance_interval": (0.2, 0.6), **TWO},
        {"prompt": "a red circle (on blue:1.3)", "prompt_syntax": "a1111"},
    ],
    ids=lambda request: "-".join(request) or "plain",
)
def test_pictures_are_the_same(pipe: Pipeline, whole: Pipeline, request_: dict[str, Any]) -> None:
    request_ = {"prompt": "a red circle", **SMALL, **request_}
    close(pipe(**request_).images, whole(**request_).images)
    close(pipe(**request_).images, whole(**request_).images)  # with prompts that are kept


@pytest.mark.parametrize("mode", ["eager", "step", "loop", "request"])
def test_every_way_of_capturing_gives_the_same(folder: Path, whole: Pipeline, mode: str) -> None:
    with Pipeline.open(folder, "onnxruntime-cpu", threads=1, mode=mode) as pipe:
        for seed in (1, 2, 3):  # as it is, captured, replayed
            request: dict[str, Any] = {"prompt": "a star", **SMALL, "seed": seed, "num_inference_steps": 3}
            close(pipe(**request).images, whole(**request).images)


def test_a_stage_at_a_time_gives_the_same(folder: Path, whole: Pipeline) -> None:
    with Pipeline.open(folder, "onnxruntime-cpu", threads=1, low_memory=True) as pipe:
        for _ in range(2):
            close(pipe("a star", **SMALL).images, whole("a star", **SMALL).images)
        assert pipe.session.open_graphs == set()


def test_embeddings_stand_for_prompts(pipe: Pipeline, whole: Pipeline) -> None:
    given = np.random.default_rng(0).standard_normal((2, 1, *_tokens(whole))).astype(np.float32)
    request: dict[str, Any] = {**SMALL, "prompt_embeds": given[0], "negative_prompt_embeds": given[1]}
    close(pipe(prompt=None, **request).images, whole(prompt=None, **request).images)


def _tokens(pipe: Pipeline) -> tuple[int, int]:
    info = next(spec for spec in pipe.bundle.graph("denoiser").inputs if spec.name == "context")
    return pipe.bundle.manifest.tokenizers[0].max_length, int(info.shape[2])


def test_images_in_flight_have_timesteps_of_their_own(pipe: Pipeline, whole: Pipeline) -> None:
    """Unlike requests share steps, alone and together, and each is what the whole denoiser draws."""
    requests: list[dict[str, Any]] = [
        {"prompt": "a red circle", **SMALL},
        {"prompt": "two stars", **SMALL, "num_inference_steps": 7, "seed": 9, "guidance_scale": 1.0},
        {"prompt": "a cross", **SMALL, "num_inference_steps": 5, "sampler": "euler_a", "negative_prompt": "blurry"},
    ]
    with Batcher(pipe, slots=3) as batcher:
        alone = [batcher.submit(**request).result(300).images for request in requests]
        together = [job.result(300).images for job in [batcher.submit(**request) for request in requests]]
    for request, one, other in zip(requests, alone, together, strict=True):
        close(one, whole(**request).images)
        close(other, whole(**request).images)


def test_inspect_says_how_much_runs_when(folder: Path) -> None:
    from latentrt.runtime.cli.app import app
    from typer.testing import CliRunner

    manifest = Bundle.open(folder).manifest
    files = {name: (folder / name).stat().st_size for name in manifest.files}
    once = sum(files[f"{name}.onnx"] for name in ("prompt", "schedule"))
    assert manifest.bytes_of("request") == once
    assert manifest.bytes_of("step") == sum(files[f"{name}.onnx"] for name in ("modulation", "denoiser", "step"))
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "graphs and weights for every step" in shown and "once for a request" in shown


def test_shapes_of_all_graphs_are_asked_for(pipe: Pipeline) -> None:
    shapes = requested_shapes(pipe.bundle, 64, 64, 2)
    rows, times = shapes["schedule"]["row_timesteps"]
    assert rows == 4 and times % 16 == 0 and times >= pipe.bundle.manifest.default_num_inference_steps
    width = int(pipe.bundle.graph("modulation").outputs[0].shape[1])
    assert shapes["modulation"] == {"modulations": (rows, times, width), "row": (2,)}
    assert shapes["denoiser"]["modulation"] == (rows, width)


def test_drift_puts_the_parts_together_and_says_where_it_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = drift(folder, exact=ensure_bundle(), backend="onnxruntime-cpu", steps=2, threads=1)
    errors = {t.tensor: t.relative_error for t in report.tensors}
    assert list(errors) == ["text_encoder.context", "denoiser.prediction", "decoder.image", "decoder.pixels"]
    assert errors["denoiser.prediction"] < 1e-5 and report.within
    assert report.left_out == {"image_encoder": "the request does not run it"}
    back = drift(ensure_bundle(), exact=folder, backend="onnxruntime-cpu", steps=2, threads=1)
    assert "denoiser.prediction" not in {t.tensor for t in back.tensors} and back.within
    assert back.left_out["denoiser"] == f"it reads other tensors in {folder}"
    with monkeypatch.context() as patch:
        patch.setattr(drifts, "at_one_step", lambda timestep: at_one_step(timestep + 50))
        late = drift(folder, exact=ensure_bundle(), backend="onnxruntime-cpu", steps=2, threads=1)
    assert [t.tensor for t in late.tensors if not t.within] == ["denoiser.prediction"]
    alike = drift(folder, backend="onnxruntime-cpu", steps=2, threads=1)
    assert {t.tensor.partition(".")[0] for t in alike.tensors} >= {"prompt", "schedule", "denoiser"}
    assert all(t.relative_error == 0 for t in alike.tensors)


def test_parts_are_compared_layer_by_layer(folder: Path) -> None:
    pytest.importorskip("polygraphy")
    for graph in ("prompt", "schedule", "modulation", "denoiser"):
        layers = layer_errors(Bundle.open(folder), graph, "onnxruntime-cpu", 1)
        assert layers and all(layer.relative_error < 1e-4 and not layer.nan_count for layer in layers)
