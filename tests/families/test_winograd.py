"""Checkpoints exported with convolutions in half the products, against diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.passes import winograd  # noqa: E402

from . import tiny, tiny_transformers  # noqa: E402
from .compare import check, opened, picture  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3}


@pytest.mark.parametrize(
    ("write", "pipeline", "hoist"),
    [
        (tiny.sd15, "StableDiffusion", False),
        (tiny.sdxl, "StableDiffusionXL", True),
        (tiny_transformers.sd3, "StableDiffusion3", False),
    ],
)
def test_requests(
    write: Callable[[Path], Path], pipeline: str, hoist: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size whose rows are not four by four either, in every network and on every backend of a processor."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 1)
    checkpoint = write(tmp_path / "checkpoint")
    bundle = Bundle.open(export_checkpoint(checkpoint, tmp_path / "bundle", winograd=True, hoist=hoist))
    counts = {graph.name: graph.winograd for graph in bundle.manifest.graphs}
    assert min(counts["decoder"], counts["image_encoder"]) > 3 and (counts["denoiser"] > 3) == (pipeline[-1] != "3")
    text = opened(getattr(diffusers, f"{pipeline}Pipeline"), checkpoint)
    image = opened(getattr(diffusers, f"{pipeline}Img2ImgPipeline"), checkpoint)
    for backend, reference, request in (
        ("onnxruntime-cpu", text, {"height": 48, "width": 16, "num_images_per_prompt": 2}),
        ("onnxruntime-cpu", image, {"image": picture(), "strength": 0.7}),
        ("openvino", text, {"height": 48, "width": 16}),
    ):
        if backend == "openvino":
            pytest.importorskip("openvino")
        with Pipeline.open(bundle.path, backend) as pipe:
            check(pipe, reference, **QUICK, **request)
