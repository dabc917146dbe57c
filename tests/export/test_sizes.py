"""Every size that diffusers draws: latents that do not divide by the U-Net's halvings, as 720p and 1080p are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import RequestError
from latentrt.runtime import Pipeline
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT, STEPS, SEED = "a red circle", 2, 5


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def checkpoint(tiny_sd21_checkpoint: Path) -> Path:
    """Four levels in the U-Net and in the autoencoder, as Stable Diffusion has them."""
    return tiny_sd21_checkpoint


@pytest.fixture(scope="module")
def pipe(tiny_sd21_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd21_bundle, "onnxruntime-cpu") as opened:
        yield opened


def reference(checkpoint: Path, kind: str, *, steps: int = STEPS, **arguments: Any) -> Any:
    pipeline = getattr(diffusers, kind).from_pretrained(checkpoint, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    return np.asarray(pipeline(PROMPT, num_inference_steps=steps, generator=generator, **arguments).images[0])


def far(ours: Any, theirs: Any) -> int:
    return int(np.abs(np.asarray(ours).astype(int) - theirs).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("width", "height"),
    [(64, 64), (72, 136), (200, 104), (8, 64), (24, 64)],
)
def test_every_multiple_of_the_autoencoder_s_factor(checkpoint: Path, pipe: Pipeline, width: int, height: int) -> None:
    picture = pipe(PROMPT, width=width, height=height, num_inference_steps=STEPS, seed=SEED).images[0]
    assert picture.size == (width, height)
    theirs = reference(checkpoint, "StableDiffusionPipeline", width=width, height=height)
    assert far(picture, theirs) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("width", "height"), [(904, 512), (800, 600), (1280, 720), (1920, 1080)])
def test_sizes_of_screens(checkpoint: Path, pipe: Pipeline, width: int, height: int) -> None:
    """One step without guidance: attention over 32,400 cells takes its time."""
    request: dict[str, Any] = {"width": width, "height": height, "guidance_scale": 1.0}
    picture = pipe(PROMPT, num_inference_steps=1, seed=SEED, **request).images[0]
    assert far(picture, reference(checkpoint, "StableDiffusionPipeline", steps=1, **request)) <= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(288, 72), (100, 141), (64, 64)])
def test_an_initial_picture_keeps_its_size(checkpoint: Path, pipe: Pipeline, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    result = pipe(PROMPT, image=pixels, strength=1.0, num_inference_steps=STEPS, seed=SEED)
    assert result.images[0].size == tuple(side // 8 * 8 for side in size)
    theirs = reference(checkpoint, "StableDiffusionImg2ImgPipeline", image=Image.fromarray(pixels), strength=1.0)
    assert far(result.images[0], theirs) <= 2
    changed = any(side % 8 for side in size)
    assert [warning for warning in result.warnings if f"{size[0]}x{size[1]}" in warning] == result.warnings
    assert len(result.warnings) == changed


def test_a_side_that_was_asked_for_is_no_change(pipe: Pipeline) -> None:
    pixels = np.zeros((64, 100, 3), np.uint8)
    request: dict[str, Any] = {"image": pixels, "strength": 1.0, "num_inference_steps": 1}
    assert pipe(PROMPT, width=96, **request).warnings == []
    assert "100x64: it is resized to 96x72" in pipe(PROMPT, height=72, **request).warnings[0]


def test_other_sizes_are_refused_with_the_nearest(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="width is 100: this bundle needs a multiple of 8; try 96 or 104"):
        pipe(PROMPT, width=100)
    with pytest.raises(RequestError, match="the picture is 8192x8192, 67 Mpixels: at most 17"):
        pipe(PROMPT, width=8192, height=8192)
