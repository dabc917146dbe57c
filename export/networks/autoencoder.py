"""diffusers' autoencoders as graphs: the decoder at the end of every request, the encoder for initial pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import LatentInfo, TensorInfo
from ..checkpoints.configs import NULL, NUMBER, NUMBERS, SCALE, WHOLE, WHOLES, WORDS
from ..graph import Graph
from .parts import diffusers_part

Scale = float | Tensor
"""One number, or [1, C, 1, 1] with one for each channel."""


class _Half(nn.Module):
    """One half of an autoencoder, with the scale and shift of its latents; the other half's weights are let go."""

    vae: Any

    def __init__(self, vae: Any, *others: str) -> None:
        super().__init__()
        for other in others:
            setattr(vae, other, None)
        self.vae = vae
        self.scale: Scale = vae.config.scaling_factor
        self.shift: Scale = vae.config.shift_factor or 0.0
        mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is not None and deviation is not None:  # of each channel
            self.scale = self.scale / torch.tensor(deviation).view(1, -1, 1, 1)
            self.shift = torch.tensor(mean).view(1, -1, 1, 1)


class Decoder(_Half):
    """The VAE's decoder with everything between latents and a picture."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, "encoder", "quant_conv")

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures of latents [B, C, h, w]: bytes and floats in [0, 1], both [B, H, W, 3]."""
        latents = latents / self.scale
        latents = latents + self.shift if _is_there(self.shift) else latents
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        pixels = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (pixels * 255).round().to(torch.uint8), pixels


class ImageEncoder(_Half):
    """The VAE's encoder with everything between a picture and the moments of its latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, "decoder", "post_quant_conv")

    def forward(self, image: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, C, h, w] of the latents of pictures [B, H, W, 3] in bytes.

        Where `kept` [B, H, W, 1] is 0 they are gray, between black and white.
        """
        pixels = image.float() / 255 * 2 - 1
        pixels = (pixels if kept is None else pixels * kept).permute(0, 3, 1, 2)
        moments = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        mean, std = moments.mean.float(), moments.std.float()
        return (mean - self.shift if _is_there(self.shift) else mean) * self.scale, std * self.scale


def _is_there(shift: Scale) -> bool:
    return isinstance(shift, Tensor) or bool(shift)


def decoder_graph(vae: Any, name: str = "decoder") -> Graph:
    """Latents [B, C, h, w] to pictures [B, H, W, 3], as bytes and as floats in [0, 1]."""
    factor = vae_factor(vae.config)
    picture = ("B", f"{factor}*h", f"{factor}*w", vae.config.out_channels)
    return Graph(
        name,
        "end",
        Decoder(vae),
        (TensorInfo(name="latents", dtype="float32", shape=("B", vae.config.latent_channels, "h", "w")),),
        (
            TensorInfo(name="image", dtype="uint8", shape=picture),
            TensorInfo(name="pixels", dtype="float32", shape=picture),
        ),
        limits={},
    )


def image_encoder_graph(vae: Any, *, masked: bool = False) -> Graph:
    """A picture [B, H, W, 3] in bytes to mean and standard deviation of its latents [B, C, h, w].

    With `masked` it also reads what is kept of it, 1, and what is gray, 0: [B, H, W, 1].
    """
    factor = vae_factor(vae.config)
    latents, size = ("B", vae.config.latent_channels, "h", "w"), (f"{factor}*h", f"{factor}*w")
    inputs = [TensorInfo(name="image", dtype="uint8", shape=("B", *size, vae.config.in_channels))]
    if masked:
        inputs.append(TensorInfo(name="kept", dtype="float32", shape=("B", *size, 1)))
    return Graph(
        "image_encoder",
        "image",
        ImageEncoder(vae),
        tuple(inputs),
        (
            TensorInfo(name="latents_mean", dtype="float32", shape=latents),
            TensorInfo(name="latents_std", dtype="float32", shape=latents),
        ),
        limits={"image": 256},
    )


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return how many pixels a latent cell covers on each side."""
    channels = config.get("decoder_block_out_channels") or config["block_out_channels"]
    return int(config.get("upsampling_scaling_factor", 2)) ** (len(channels) - 1)


def geometry(factor: int, channels: int, height: int, width: int, square: int = 1) -> LatentInfo:
    """Return the geometry of latents whose cells are `factor` pixels wide, for a usual size in cells.

    A picture must be whole squares of `square` cells.
    """
    return LatentInfo(
        channels=channels,
        downscale=factor,
        size_multiple=square * factor,
        default_height=height * factor,
        default_width=width * factor,
    )


def _old_attention_name(name: str) -> str:
    """Return the name that autoencoders saved before diffusers 0.15 give to an attention weight."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


LAYOUT = {
    "in_channels": WHOLE,
    "out_channels": WHOLE,
    "latent_channels": WHOLE,
    "block_out_channels": WHOLES,
    "down_block_types": WORDS,
    "up_block_types": WORDS,
    "layers_per_block": WHOLE,
}
AUTOENCODER_KL = diffusers_part(
    "AutoencoderKL",
    "autoencoders.autoencoder_kl",
    LAYOUT
    | {
        "scaling_factor": SCALE,
        "shift_factor": NUMBER | NULL,
        "latents_mean": NUMBERS | NULL,
        "latents_std": NUMBERS | NULL,
    },
    renames=(_old_attention_name,),
    depth=("layers_per_block",),
)
AUTOENCODER_TINY = diffusers_part(
    "AutoencoderTiny",
    "autoencoders.autoencoder_tiny",
    {
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor"), WHOLE),
        **{f"{half}_block_out_channels": WHOLES for half in ("encoder", "decoder")},
        **{f"num_{half}_blocks": WHOLES for half in ("encoder", "decoder")},
        "scaling_factor": SCALE,
        "shift_factor": NUMBER,
    },
    depth=("num_encoder_blocks", "num_decoder_blocks"),
)
