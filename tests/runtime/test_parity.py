"""The same prompt and seed give diffusers' picture: every sampler family, guidance on and off, all three tasks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrt.runtime import Pipeline
from PIL import Image

PROMPT, NEGATIVE = "a red circle on a blue background", "a gray cross"
STEPS = 4

SAMPLERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "LCMScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


class Reference:
    """diffusers' pipelines over one checkpoint, their modules loaded once."""

    def __init__(self, checkpoint: Path) -> None:
        import diffusers

        self._diffusers = diffusers
        self._pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            checkpoint, safety_checker=None, requires_safety_checker=False, torch_dtype=torch.float32
        )
        self._config = self._pipe.scheduler.config

    def __call__(self, task: str, sampler: str | None, seed: int, **arguments: Any) -> np.ndarray:
        """Run one task and return float pictures [B, H, W, 3], or latents for output_type="latent"."""
        names = {"text": "StableDiffusionPipeline", "image": "StableDiffusionImg2ImgPipeline"}
        cls = getattr(self._diffusers, names.get(task, "StableDiffusionInpaintPipeline"))
        pipe = cls(**self._pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        if sampler is not None:
            pipe.scheduler = getattr(self._diffusers, sampler).from_config(self._config)
        output = pipe(generator=torch.Generator().manual_seed(seed), **arguments).images
        return output.numpy() if isinstance(output, torch.Tensor) else np.asarray(output)


@pytest.fixture(scope="module")
def reference(tiny_sd15_checkpoint: Path) -> Reference:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Reference(tiny_sd15_checkpoint)


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        yield pipe


def picture() -> Image.Image:
    y, x = np.mgrid[:64, :64] * 4
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def mask() -> Image.Image:
    array = np.zeros((64, 64), np.uint8)
    array[16:48, 8:40] = 255
    return Image.fromarray(array)


def task_arguments(task: str, strength: float = 0.6) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if task == "text" else {"image": picture(), "strength": strength}
    if task == "inpaint":
        arguments["mask_image"] = mask()
    if task != "image":
        arguments |= {"height": 64, "width": 64}
    return arguments


def max_pixel_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs((a * 255).round() - (b * 255).round()).max())


TASKS = [(sampler, task, 7.5) for sampler in SAMPLERS for task in ("text", "inpaint")]
TASKS += [(sampler, "image", 7.5) for sampler in SAMPLERS[::3]]
TASKS += [(sampler, task, 1.0) for sampler, task in zip(SAMPLERS[::2], cycle(("text", "image", "inpaint")))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sampler", "task", "guidance"), TASKS)
def test_pictures_match_diffusers(
    pipe: Pipeline, reference: Reference, sampler: str, task: str, guidance: float
) -> None:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": guidance, **task_arguments(task)}
    wanted = reference(task, sampler, 7, prompt=PROMPT, negative_prompt=NEGATIVE, output_type="np", **arguments)
    got = pipe(PROMPT, NEGATIVE, seed=7, sampler=sampler, output_type="np", **arguments).images
    assert got.dtype == np.float32 and got.shape == wanted.shape == (1, 64, 64, 3)
    assert max_pixel_difference(got, wanted) <= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_match_diffusers(pipe: Pipeline, reference: Reference, sampler: str) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "latent"}
    wanted = reference("text", sampler, 3, prompt=PROMPT, height=64, width=64, **arguments)
    got = pipe(PROMPT, seed=3, sampler=sampler, height=64, width=64, **arguments).images
    assert got.dtype == np.float32 and got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.filterwarnings("ignore")
def test_the_checkpoints_own_sampler_and_full_strength_inpainting_match(pipe: Pipeline, reference: Reference) -> None:
    for task in ("image", "inpaint"):
        arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, **task_arguments(task, strength=1.0)}
        wanted = reference(task, None, 11, prompt=PROMPT, output_type="np", **arguments)
        got = pipe(PROMPT, seed=11, output_type="np", **arguments).images
        assert max_pixel_difference(got, wanted) <= 2


@pytest.mark.filterwarnings("ignore")
def test_ddim_eta_matches(pipe: Pipeline, reference: Reference) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "eta": 0.7, "output_type": "np"}
    wanted = reference("text", "DDIMScheduler", 5, prompt=PROMPT, height=64, width=64, **arguments)
    got = pipe(PROMPT, seed=5, sampler="DDIMScheduler", height=64, width=64, **arguments).images
    assert max_pixel_difference(got, wanted) <= 2


@pytest.mark.filterwarnings("ignore")
def test_a_long_prompt_is_cut_as_diffusers_cuts_it(pipe: Pipeline, reference: Reference) -> None:
    prompt = " ".join([PROMPT] * 20)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
    result = pipe(prompt, seed=1, guidance_scale=3.0, **arguments)
    assert len(result.warnings) == 1 and "is not used" in result.warnings[0]
    wanted = reference("text", None, 1, prompt=prompt, guidance_scale=3.0, **arguments)
    assert max_pixel_difference(result.images, wanted) <= 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_v_prediction_and_open_clip_match(tiny_sd21_checkpoint: Path, tiny_sd21_bundle: Path) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "height": 64, "width": 64}
    reference = Reference(tiny_sd21_checkpoint)
    with Pipeline.open(tiny_sd21_bundle, "onnxruntime-cpu", threads=1) as pipe:
        for sampler in (None, "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            wanted = reference("text", sampler, 2, prompt=PROMPT, output_type="np", **arguments)
            got = pipe(PROMPT, seed=2, sampler=sampler, output_type="np", **arguments).images
            assert max_pixel_difference(got, wanted) <= 2, sampler
