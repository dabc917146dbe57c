"""Tiny checkpoints of diffusers' own pipelines with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from latentrt.benchmarks.random_checkpoint import write_tokenizer

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 32,
}


def clip(vocab_size: int, kind: str = "CLIPTextModel", **options: Any) -> Any:
    """Return a CLIP text encoder, which ends at the last token of a vocabulary."""
    config = transformers.CLIPTextConfig(
        vocab_size=vocab_size, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, **{**CLIP, **options}
    )
    return getattr(transformers, kind)(config).eval()


def clip_tokenizer(folder: Path) -> tuple[Any, int]:
    """Return a CLIP tokenizer of the letters and a few words, and the size of its vocabulary."""
    size = write_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(str(folder)), size


def vae(**options: Any) -> Any:
    """Return an autoencoder of two levels: a cell is two pixels wide."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=64,
        **{
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "latent_channels": 4,
            "scaling_factor": 0.13025,
            **options,
        },
    ).eval()


def sdxl(
    folder: Path,
    *,
    refiner: bool = False,
    original: bool = False,
    scheduler: Any = None,
    latents: Any = (),
    **options: Any,
) -> Path:
    """Write a tiny Stable Diffusion XL, or its refiner; `original` gives it the heads and groups that files have.

    `latents` is what the config of its VAE says of them.
    """
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    padded = transformers.CLIPTokenizer.from_pretrained(tokenizer.name_or_path, pad_token="!")
    heads, groups, channels = (1, 32, (32, 64)) if original else (4, 8, (16, 32))
    second = clip(size, "CLIPTextModelWithProjection", hidden_size=48, hidden_act="gelu", num_attention_heads=heads)
    width = 48 if refiner else 80
    count = 5 if refiner else 6
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=channels,
        layers_per_block=1,
        sample_size=32,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + 8 * count,
        cross_attention_dim=width,
        norm_num_groups=groups,
        attention_head_dim=1 if original else (2, 4),
        **{"in_channels": 4, **options},
    ).eval()
    usual = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    parts = {
        "text_encoder": None if refiner else clip(size, num_attention_heads=heads),
        "text_encoder_2": second,
        "tokenizer": None if refiner else tokenizer,
        "tokenizer_2": padded,
        "unet": unet,
        "vae": vae(block_out_channels=channels, norm_num_groups=groups, **dict(latents)),
        "scheduler": scheduler or usual,
    }
    if refiner:
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
        )
    else:
        masked = unet.config.in_channels == 9
        kind = diffusers.StableDiffusionXLInpaintPipeline if masked else diffusers.StableDiffusionXLPipeline
        pipeline = kind(**parts)
    pipeline.save_pretrained(folder)
    return folder


def sd15(folder: Path, kind: str = "StableDiffusionPipeline", **options: Any) -> Path:
    """Write a tiny Stable Diffusion 1.x."""
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=32,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
        **{"in_channels": 4, **options},
    ).eval()
    trained = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    usual = diffusers.PNDMScheduler(**trained, skip_prk_steps=True, steps_offset=1)
    pipeline = getattr(diffusers, kind)(
        text_encoder=clip(size),
        tokenizer=tokenizer,
        unet=unet,
        vae=vae(scaling_factor=0.18215),
        scheduler=diffusers.LCMScheduler(**trained) if kind.startswith("LatentC") else usual,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
