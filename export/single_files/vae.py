"""Autoencoders in single files: of their own or in a whole checkpoint, in the original layout or in diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from ..checkpoints.checkpoint import Component, Part
from ..checkpoints.weights import Weights
from .names import VAE, vae_tensor
from .shapes import read

VAE_PREFIXES = (VAE, "vae.")
SCALE = {"scaling_factor": 0.18215}
"""Of Stable Diffusion 1.x and 2.x; no tensor tells it, and families with others say so (`Family.vae_scale`)."""
LAYOUTS = {"original": ("encoder.down.", "block"), "diffusers": ("encoder.down_blocks.", "resnets")}
"""How the names of levels begin, and what the residual blocks of one are called."""


def open_vae_file(file: Path, weights: Weights, part: Part) -> Component | None:
    """Open a VAE of its own or out of a whole checkpoint, in the original or in diffusers' layout, or return None."""
    for prefix in (*VAE_PREFIXES, ""):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in weights:
            return _original_vae(f"VAE {file}", weights, part, prefix)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        config = read(weights, lambda weights: _config(weights, "diffusers", "")) | SCALE
        return Component.of(part, f"VAE {file}", config, weights)
    return None


def own_vae(file: Path, weights: Weights, part: Part, scale: Mapping[str, Any] = SCALE) -> Component:
    """Open the VAE of a whole checkpoint; raises `CheckpointError` for one that has none.

    `scale` is what its config says of the latents' size, which no tensor tells.
    """
    for prefix in VAE_PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            return _original_vae(f"VAE of {file}", weights, part, prefix, scale)
    raise CheckpointError(f"{file} has no VAE ({VAE}*): give one with --vae, a folder, a file or a hub id")


def _original_vae(where: str, weights: Weights, part: Part, prefix: str, scale: Mapping[str, Any] = SCALE) -> Component:
    config = read(weights, lambda weights: _config(weights, "original", prefix)) | dict(scale)
    levels = len(config["block_out_channels"])
    return Component.of(part, where, config, weights, lambda name: vae_tensor(weights, name, levels, prefix))


def _config(weights: Weights, layout: str, prefix: str) -> dict[str, Any]:
    """Return diffusers' autoencoder config, read off the tensors' shapes."""
    down, block = LAYOUTS[layout]
    down = prefix + down
    places = {tuple(name[len(down) :].split(".")[:3]) for name in weights if name.startswith(down)}
    levels = len({place[0] for place in places})
    quantized = any(f"{prefix}{name}.weight" in weights for name in ("quant_conv", "post_quant_conv"))
    latents = "post_quant_conv" if quantized else "decoder.conv_in"
    return {
        "block_out_channels": [weights.shape(f"{down}{level}.{block}.0.conv2.weight")[0] for level in range(levels)],
        "layers_per_block": len({place for place in places if place[:2] == ("0", block)}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": weights.shape(f"{prefix}{latents}.weight")[1],
        "use_quant_conv": quantized,
        "use_post_quant_conv": quantized,
    }
