"""Tiny checkpoints of Z-Image and Stable Diffusion 3 with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .tiny import clip, clip_tokenizer, vae
from .tiny_flux import qwen_tokenizer, t5, t5_tokenizer


def qwen3(vocab_size: int, kind: str = "Qwen3Model", **options: Any) -> Any:
    """Return a Qwen3 of few layers, two heads of which share keys and values."""
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            **options,
        },
    )
    return getattr(transformers, kind)(config).eval()


def vae_of_flow(**options: Any) -> Any:
    """Return an autoencoder of 16 channels without convolutions between its halves."""
    return vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **options)


def z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """Write a tiny Z-Image, or with the shift 3 its Turbo."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 512, 512],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipeline = diffusers.ZImagePipeline(
        text_encoder=qwen3(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path, *, with_t5: bool = True, newer: bool = False, dynamic: bool = False, layers: int = 2) -> Path:
    """Write a tiny Stable Diffusion 3, or with `newer` 3.5, whose shift may depend on the size of the picture."""
    torch.manual_seed(0)
    tokenizer, size = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=48,
        dual_attention_layers=(0,) if newer else (),
        qk_norm="rms_norm" if newer else None,
    ).eval()
    pipeline = diffusers.StableDiffusion3Pipeline(
        text_encoder=clip(size, "CLIPTextModelWithProjection", hidden_size=16, projection_dim=16),
        text_encoder_2=clip(size, "CLIPTextModelWithProjection", hidden_size=24, hidden_act="gelu"),
        text_encoder_3=t5(len(tokenizer_3), d_model=48) if with_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        vae=vae_of_flow(scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
    )
    pipeline.save_pretrained(folder)
    return folder


def sd35(folder: Path) -> Path:
    """Write a tiny Stable Diffusion 3.5 without T5, its shift dynamic."""
    return sd3(folder, with_t5=False, newer=True, dynamic=True)
