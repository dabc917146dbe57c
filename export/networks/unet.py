"""diffusers' `UNet2DConditionModel` as the graph that runs once for each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import NumbersInput, Precision, TensorInfo
from ..checkpoints.configs import NULL, PAIR, WHOLE, WHOLES, WORDS
from ..graph import Graph, inward, network_dtype, outward
from .parts import diffusers_part

MASKED_PICTURE = "masked_picture"
"""The input of an inpainting U-Net beside the latents: where to repaint, and the latents of what is left."""
EMBEDDED_GUIDANCE = (NumbersInput(name="guidance", values=("guidance_scale",)),)


UNET = diffusers_part(
    "UNet2DConditionModel",
    "unets.unet_2d_condition",
    {
        "in_channels": WHOLE,
        "out_channels": WHOLE,
        "block_out_channels": WHOLES,
        "down_block_types": WORDS,
        "up_block_types": WORDS,
        "layers_per_block": WHOLE | WHOLES,
        "cross_attention_dim": WHOLE | WHOLES,
        "sample_size": WHOLE | PAIR | NULL,
    },
    depth=("layers_per_block", "transformer_layers_per_block"),
)


class Denoiser(nn.Module):
    """The U-Net for every latent size; its timestep embedding is computed in float32 whatever its own precision."""

    unet: Any

    def __init__(self, unet: Any) -> None:
        super().__init__()
        unet.num_upsamplers = _Uneven()
        self.unet = unet
        self.guidance_width: int | None = unet.config.time_cond_proj_dim

    def forward(
        self,
        model_input: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        masked_picture: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        inside = self.unet.dtype
        if masked_picture is not None:
            model_input = torch.cat([model_input, masked_picture], dim=1)
        added = None if pooled is None else {"text_embeds": pooled.float(), "time_ids": time_ids}
        condition = None
        if guidance is not None:
            condition = guidance_embedding(guidance[:, 0], self.guidance_width or 0).to(inside)
        prediction: Tensor = self.unet(
            inward(model_input, inside),
            timestep,
            inward(context, inside),
            timestep_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return outward(prediction)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Return diffusers' embedding [R, width] of guidance scales [R], which distilled U-Nets read (LCM)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000.0 * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def embedded_guidance(config: Mapping[str, Any]) -> bool:
    """Tell whether a U-Net reads the guidance scale, and is not guided by a second prediction."""
    return config.get("time_cond_proj_dim") is not None


def inpaints(config: Mapping[str, Any]) -> bool:
    """Tell whether a U-Net reads a mask and the latents of a masked picture behind its own latents."""
    inside: bool = config["in_channels"] == 2 * config["out_channels"] + 1
    return inside


def channels_of(pipeline: str, latent: int) -> set[tuple[int, int]]:
    """Return the channels that a U-Net may take and give in a pipeline of text, pictures or masks."""
    ordinary = {(latent, latent)}
    return ordinary | {(2 * latent + 1, latent)} if "Inpaint" in pipeline else ordinary


class _Uneven(int):
    """A number of upsamplers by which no size divides: `size % 2**self` is 1, of symbolic sizes as well.

    diffusers' U-Net doubles on its way up when the size divides by all of its halvings, and otherwise resizes to what
    the skip connection holds. The second is right for both, so that one trace serves every size.
    """

    def __rpow__(self, base: int, modulus: int | None = None) -> Any:
        return _Remainder()


class _Remainder:
    def __rmod__(self, size: Any) -> int:
        return 1


def denoiser_graph(unet: Any, length: int, precision: Precision, pooled: int | None = None) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R] and conditioning [R, L, E] to the prediction [R, C, h, w].

    A U-Net with text and time embeddings (SDXL) also reads the whole prompt's, [R, `pooled`], and size ids [R, N]; one
    with an embedded guidance scale reads that, [R, 1]; one for inpainting reads a masked picture, [R, 1 + C, h, w].
    """
    config, dtype = unet.config, network_dtype(precision)
    masked = inpaints(config)
    latents = config.out_channels if masked else config.in_channels
    inputs = [
        TensorInfo(name="model_input", dtype=dtype, shape=("R", latents, "h", "w")),
        TensorInfo(name="timestep", dtype="float32", shape=("R",)),
        TensorInfo(name="context", dtype=dtype, shape=("R", "L", config.cross_attention_dim)),
    ]
    limits: dict[str, float] = {"timestep": 1000}
    if pooled is not None:
        count = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        inputs += [
            TensorInfo(name="pooled", dtype=dtype, shape=("R", pooled)),
            TensorInfo(name="time_ids", dtype="float32", shape=("R", count)),
        ]
        limits["time_ids"] = 1024
    if embedded_guidance(config):
        inputs.append(TensorInfo(name="guidance", dtype="float32", shape=("R", 1)))
        limits["guidance"] = 10
    if masked:
        inputs.append(TensorInfo(name=MASKED_PICTURE, dtype=dtype, shape=("R", 1 + latents, "h", "w")))
    return Graph(
        "denoiser",
        "step",
        Denoiser(unet),
        tuple(inputs),
        (TensorInfo(name="prediction", dtype=dtype, shape=("R", config.out_channels, "h", "w")),),
        limits=limits,
        smallest=dict.fromkeys("hw", 2 ** (len(config.block_out_channels) - 1) + 1),  # 2 cells or more in every level
        usual={"L": length},
    )
