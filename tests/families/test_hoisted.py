"""Denoisers of every family taken apart: the parts against the whole, and whole requests against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, Precision
from latentrt.engines.errors import ExportError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export import exporter  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.export.onnx_writer import onnx_model  # noqa: E402
from latentrt.export.passes import hoist  # noqa: E402
from latentrt.export.passes.parts import outputs_of, write_parts, write_whole  # noqa: E402

from . import tiny, tiny_flux, tiny_transformers  # noqa: E402
from .compare import check, opened  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

Write = Callable[[Path], Path]
QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 32}


def lcm(folder: Path) -> Path:
    return tiny.sd15(folder, "LatentConsistencyModelPipeline", time_cond_proj_dim=16)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (tiny.sd15, {"context", "row_timesteps"}),
        (lcm, {"context", "row_timesteps", "guidance"}),
        (tiny.sdxl, {"context", "row_timesteps", "pooled", "time_ids"}),
        (tiny_transformers.sd3, {"context", "row_timesteps", "pooled"}),
        (tiny_transformers.sd35, {"context", "row_timesteps", "pooled"}),
        (tiny_flux.flux, {"context", "row_timesteps", "pooled", "guidance"}),
        (tiny_flux.klein, {"context", "row_timesteps"}),
        (tiny_flux.flux2_dev, {"context", "row_timesteps", "guidance"}),
        (tiny_transformers.z_image, {"context", "row_timesteps"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_give_what_the_whole_gives(write: Write, read: set[str], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint"))
    family = family_named(checkpoint.family)
    lengths = {name: length for name, (length, _) in family.token_lengths(checkpoint).items()}
    graph = family.graphs(checkpoint, "fp32", lengths)["denoiser"]()
    graph = replace(graph, usual={"L": 16})  # networks this small hold few weights beside a long text
    model = onnx_model(graph)
    whole = write_whole(graph, model, tmp_path, "fp32")
    (tmp_path / "parts").mkdir()
    parts = write_parts(graph, model, tmp_path / "parts", "fp32")
    assert {spec.name for part in parts if part.stage == "request" for spec in part.inputs} == read
    left = {spec.name for spec in parts[-1].inputs}
    assert {"model_input", "prompt_0", "modulation"} <= left and not left & {"timestep", "context", "pooled"}
    for sizes in ((1, 16, 8), (3, 10, 14)):
        case = {name: value.numpy() for name, value in graph.random_inputs(graph.sizes(sizes), seed=sizes[0]).items()}
        ((found,),) = outputs_of(parts, tmp_path / "parts", [case])
        ((expected,),) = outputs_of(whole, tmp_path, [case])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("precision", "most"), [("bf16", 10**9), ("fp32", 0)])
def test_parts_that_do_not_fit_are_found_whatever_is_checked_in_place_of_them(
    precision: Precision, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the parts themselves do not run here, in bf16, or are too large."""
    rest = hoist._rest
    monkeypatch.setattr(hoist, "_rest", lambda model, read, texts, times: rest(model, read, texts, times[::-1]))
    monkeypatch.setattr(exporter, "MOST_AT_FULL_SIZE", most)
    checkpoint = open_checkpoint(tiny_flux.flux(tmp_path / "checkpoint"))
    family = family_named(checkpoint.family)
    lengths = {name: length for name, (length, _) in family.token_lengths(checkpoint).items()}
    with pytest.raises(ExportError, match="denoiser differs from its PyTorch module"):
        exporter.write_network(family, checkpoint, lengths, "denoiser", tmp_path, precision, hoist=True)


@pytest.mark.parametrize(
    ("write", "pipeline", "guidance"),
    [
        (tiny.sdxl, "StableDiffusionXLPipeline", "guidance_scale"),
        (tiny_transformers.sd3, "StableDiffusion3Pipeline", "guidance_scale"),
    ],
)
def test_requests(write: Write, pipeline: str, guidance: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint")
    bundle = Bundle.open(export_checkpoint(checkpoint, tmp_path / "bundle", hoist=True))
    assert bundle.manifest.bytes_of("request") > 0
    assert all(graph.references for graph in bundle.manifest.graphs if graph.name != "modulation")
    reference = opened(getattr(diffusers, pipeline), checkpoint)
    with Pipeline.open(bundle.path, "onnxruntime-cpu") as pipe:
        check(pipe, reference, **QUICK)
        check(pipe, reference, **QUICK, **{guidance: 7.5}, num_images_per_prompt=2, negative_prompt="blue")
