"""Learned variances and dynamic thresholding from checkpoint to picture, against a plain loop over diffusers' parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError, UnsupportedModelError
from latentrt.runtime import Pipeline
from latentrt.runtime.sampling.step_table import STEP_INPUTS, step_options

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from latentrt.export import export_checkpoint, families  # noqa: E402

PROMPT, NEGATIVE, STEPS, SEED, GUIDANCE = "a red circle", "blue", 6, 3, 6.0
IF_STAGE = {
    "variance_type": "learned_range",
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
}
KINDS: dict[str, dict[str, Any]] = {
    "learned variance": {"variance_type": "learned_range", "clip_sample": False},
    "learned variance and dynamic thresholding": IF_STAGE,
}


@pytest.fixture(scope="module")
def one_more_family() -> Iterator[None]:
    """Let the folder of families hold more files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "__path__", [*families.__path__, str(Path(__file__).parent / "more_families")])
        families.families.cache_clear()
        yield
    families.families.cache_clear()


def checkpoint_of(tiny: Path, folder: Path, options: dict[str, Any], channels: int = 8) -> Path:
    """Write a tiny checkpoint whose U-Net gives so many channels, with a scheduler of DDPM."""
    shutil.copytree(tiny, folder)
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel.from_config(config | {"out_channels": channels}).save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(**options).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "VariancesPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Reference:
    """The parts of a checkpoint in a loop as DeepFloyd IF's pipeline has it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
        self.encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")

    @torch.no_grad()
    def draw(self, height: int, width: int, seed: int, scheduler: Any = None) -> Any:
        scheduler, texts = scheduler or self.scheduler, [NEGATIVE, PROMPT]
        ids = self.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        context = self.encoder(ids).last_hidden_state
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(seed)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        latents = torch.randn((1, 4, height // factor, width // factor), generator=generator)
        for t in scheduler.timesteps:
            prediction = self.unet(torch.cat([latents] * 2), t, context).sample
            unguided, prompted = prediction.chunk(2)
            unguided, _ = unguided.split(4, dim=1)
            prompted, variance = prompted.split(4, dim=1)
            prediction = unguided + GUIDANCE * (prompted - unguided)
            if scheduler.config.variance_type in ("learned", "learned_range"):
                prediction = torch.cat([prediction, variance], dim=1)
            latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_drawn_as_its_loop_does(
    kind: str, tiny_sd15_checkpoint: Path, tmp_path: Path, one_more_family: None
) -> None:
    folder = checkpoint_of(tiny_sd15_checkpoint, tmp_path / "checkpoint", KINDS[kind])
    bundle = Bundle.open(export_checkpoint(folder, tmp_path / "bundle"))
    inputs = [spec.name for spec in bundle.graph("step").inputs]
    assert " and ".join(sorted(step_options(inputs), reverse=True)) == kind
    reference = Reference(folder)
    request = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
        pictures = []
        for height, width in ((64, 64), (48, 72)):
            images = pipe(PROMPT, NEGATIVE, height=height, width=width, num_images_per_prompt=2, **request).images
            for number, image in enumerate(images):
                expected = reference.draw(height, width, SEED + number)
                assert np.abs(np.asarray(image) - expected).max() <= 2
                pictures.append(np.asarray(image))
        assert np.abs(pictures[0].astype(float) - pictures[1]).max() > 20
        # a solver takes the thresholds alone, and another the fixed variance of the same class
        for sampler, cls, change in (
            ("DPMSolverMultistepScheduler", diffusers.DPMSolverMultistepScheduler, {"variance_type": None}),
            ("ddpm", diffusers.DDPMScheduler, {"variance_type": "fixed_small"}),
        ):
            other = cls.from_config(reference.scheduler.config, **change)
            if sampler == "ddpm":
                pipe.scheduler = other
            image = pipe(PROMPT, NEGATIVE, height=64, width=64, sampler=sampler, **request).images[0]
            assert np.abs(np.asarray(image) - reference.draw(64, 64, SEED, other)).max() <= 2
            most = np.abs(np.asarray(image).astype(float) - pictures[0]).max()
            assert most > (20 if sampler != "ddpm" else 0)  # in few steps the variances that it may learn are close


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholding": True, "sample_max_value": 1.5}, r"needs dynamic thresholding, .* set thresholding to false"),
        ({"variance_type": "learned_range"}, r"needs learned variance, .* lacks: set variance_type to 'fixed_small'"),
    ],
)
def test_an_ordinary_bundle_refuses_what_its_step_graph_lacks(
    options: dict[str, Any], message: str, tiny_sd15_bundle: Path
) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        inputs = {spec.name for spec in pipe.bundle.graph("step").inputs}
        assert not inputs & {name for names in STEP_INPUTS.values() for name in names}
        with pytest.raises(RequestError, match=message) as caught:
            pipe.scheduler = diffusers.DDPMScheduler(**options)
        assert "\n" not in str(caught.value) and "DDPMScheduler" in str(caught.value)
        assert pipe.scheduler.config["_class_name"] == pipe.bundle.manifest.scheduler["_class_name"]


def test_a_denoiser_without_variances_is_refused_before_anything_is_exported(
    tiny_sd15_checkpoint: Path, tmp_path: Path, one_more_family: None
) -> None:
    folder = checkpoint_of(tiny_sd15_checkpoint, tmp_path / "checkpoint", KINDS["learned variance"], channels=4)
    with pytest.raises(UnsupportedModelError, match="variance_type='learned_range' needs variances, and the denoiser"):
        export_checkpoint(folder, tmp_path / "bundle")
