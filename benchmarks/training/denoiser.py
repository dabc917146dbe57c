"""Train the conditional U-Net of the embedded model on latents that are encoded once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextModel, CLIPTokenizer

from ..quality.scenes import Scene, describe, draw, training_scenes
from .loop import fit
from .text import TOKENS, token_ids
from .vae import pictures_to_values

log = logging.getLogger(__name__)

STEPS = 4600
BATCH = 32
POOL = 12_000  # scenes
NO_PROMPT = 0.1  # share of empty prompts, for classifier-free guidance
MIN_SNR = 5.0  # the cap of min-SNR weighting (arXiv 2303.09556)


def new_unet() -> UNet2DConditionModel:
    """A conditional U-Net with random weights: cross-attention at 16×16 and 8×8."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's schedule with a larger last beta: flat backgrounds need a last sigma above 15, here 45."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def encode_scenes(vae: AutoencoderKL, count: int, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Draw training scenes: the scenes and their scaled latents, float32 [count, 4, 16, 16]."""
    rng = np.random.default_rng(seed)
    scenes = training_scenes(rng, count)
    latents = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, count, 8):  # small batches stay in the processor's cache: twice as fast
            values = pictures_to_values(draw(scenes[start : start + 8], rng))
            latents.append(vae.encode(values).latent_dist.mean.float() * vae.config.scaling_factor)
    return scenes, torch.cat(latents)


def train_denoiser(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    on_save: Callable[[int, torch.nn.Module], None] | None = None,
    steps: int = STEPS,
) -> None:
    """Train in place: the mean squared error of the predicted noise, min-SNR weighted, under a frozen text encoder."""
    unet.set_attn_processor(AttnProcessor())  # with 256 tokens and two heads, plain products are twice as fast on a CPU
    saved = folder / "latents.pt"
    if not saved.exists():
        scenes, latents = encode_scenes(vae, POOL, seed=6)
        torch.save(latents, saved)
    latents, scenes = torch.load(saved, weights_only=True), training_scenes(np.random.default_rng(6), POOL)
    log.info("unet: %d latents, std by channel %s", len(latents), latents.std((0, 2, 3)).tolist())
    alphas = new_scheduler().alphas_cumprod

    def loss(step: int) -> torch.Tensor:
        rng, generator = np.random.default_rng([7, step]), torch.Generator().manual_seed(step)
        chosen = rng.integers(POOL, size=BATCH)
        prompts = ["" if rng.random() < NO_PROMPT else describe(scenes[index], rng) for index in chosen]
        with torch.no_grad():
            context = encoder(token_ids(tokenizer, prompts)).last_hidden_state  # [B, 77, E]
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, len(alphas), (BATCH,), generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, timesteps, context).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        return (error * snr.clamp(max=MIN_SNR) / snr).mean()

    fit("unet", unet, loss, steps, 1e-3, folder, on_save=on_save)
    unet.set_attn_processor(AttnProcessor2_0())
    assert latents.shape[1:] == (4, 16, 16) and encoder.config.max_position_embeddings == TOKENS
