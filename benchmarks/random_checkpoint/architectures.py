"""What the checkpoints consist of: diffusers' and transformers' classes with their published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = dict[str, Any]
Stored = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Network:
    """A component with weights: the library that has its class, the class, and its configuration."""

    library: Literal["diffusers", "transformers"]
    kind: str
    config: Config
    config_kind: str = "CLIPTextConfig"
    """The class of the configuration, for one of transformers'."""


@dataclass(frozen=True)
class Architecture:
    """A checkpoint without its weights: everything that diffusers' `model_index.json` names, by folder."""

    pipeline: str
    networks: Mapping[str, Network]
    tokenizers: Mapping[str, str]
    """`clip`, `clip!` (padded with exclamation marks), `t5` or `qwen`."""
    scheduler: tuple[str, Config]
    """Class and configuration."""
    index: Mapping[str, Any]
    """What `model_index.json` says besides."""
    stored: Stored = "fp32"
    """The precision that its weights are published in."""
    small_vocabulary: bool = False
    """Whether the text encoder knows the words of the written tokenizer alone."""


def clip(config: Config, kind: str = "CLIPTextModel") -> Network:
    """Return a CLIP text encoder."""
    return Network("transformers", kind, config)


SD15_UNET: Config = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SD_VAE: Config = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD21_UNET = SD15_UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SD21_TEXT = SD15_TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
TINY_UNET: Config = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
}
TINY_TEXT: Config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
TINY_VAE = SD_VAE | {
    "sample_size": 32,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
DEEP_UNET = TINY_UNET | {
    "block_out_channels": [32, 32, 32, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
DEEP_VAE = TINY_VAE | {
    "sample_size": 64,
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCHEDULER: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def stable_diffusion(
    unet: Config, text: Config, vae: Config, *, second: bool = False, tiny: bool = False
) -> Architecture:
    """Return a Stable Diffusion 1, or with `second` a 2 that predicts v."""
    predicts = {"prediction_type": "v_prediction" if second else "epsilon"}
    return Architecture(
        "StableDiffusionPipeline",
        {
            "text_encoder": clip(text),
            "unet": Network("diffusers", "UNet2DConditionModel", unet),
            "vae": Network("diffusers", "AutoencoderKL", vae),
        },
        {"tokenizer": "clip!" if second else "clip"},
        ("DDIMScheduler" if second else "PNDMScheduler", predicts | SCHEDULER),
        {"feature_extractor": [None, None], "requires_safety_checker": False, "safety_checker": [None, None]},
        small_vocabulary=tiny,
    )


SMALL: dict[str, Architecture] = {
    "sd15": stable_diffusion(SD15_UNET, SD15_TEXT, SD_VAE),
    "sd21": stable_diffusion(SD21_UNET, SD21_TEXT, SD_VAE, second=True),
    "shallow-sd15": stable_diffusion(
        SD15_UNET | {"layers_per_block": 1},
        SD15_TEXT | {"num_hidden_layers": 2},
        SD_VAE | {"layers_per_block": 1},
    ),
    "tiny-sd15": stable_diffusion(TINY_UNET | {"attention_head_dim": 8}, SD15_TEXT | TINY_TEXT, TINY_VAE, tiny=True),
    "tiny-sd21": stable_diffusion(
        DEEP_UNET | {"attention_head_dim": [1, 1, 1, 1], "use_linear_projection": True},
        SD21_TEXT | TINY_TEXT,
        DEEP_VAE,
        second=True,
        tiny=True,
    ),
}
