"""diffusers' `FluxTransformer2DModel` as the graph that runs once for each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..checkpoints.configs import NULL, WHOLE, WHOLES, Kind
from ..graph import Graph, inward, network_dtype, outward
from .packed import Rotary, frequencies, grid, packed, rotary, unpacked
from .parts import diffusers_part

THETA = 10_000
LARGEST_HALF = 65504.0

LAYERS = Kind("a whole number from 1 to 1000", lambda value: WHOLE.fits(value) and value <= 1000)


class Denoiser(nn.Module):
    """The transformer on latents of any even size; positions, rotations and embedded numbers are float32."""

    transformer: Any

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.frequencies = frequencies(transformer.config.axes_dims_rope, THETA)

    def forward(
        self,
        model_input: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        net, inside = self.transformer, self.transformer.dtype
        height, width = model_input.shape[2] // 2, model_input.shape[3] // 2
        image, text = net.x_embedder(packed(inward(model_input, inside))), net.context_embedder(inward(context, inside))
        numbers = [timestep / 1000 * 1000]  # both are diffusers', and rounded
        if guidance is not None:
            numbers.append(guidance[:, 0] * 1000)
        embedded = net.time_text_embed(*numbers, inward(pooled, inside))  # [R, E]
        turns = self._turns(text.shape[1], height, width)
        for block in net.transformer_blocks:
            text, image = block(image, text, embedded, turns)
        length, both = text.shape[1], torch.cat([text, image], dim=1)
        for block in net.single_transformer_blocks:
            both = _single(block, both, embedded, turns)
        tokens = net.proj_out(net.norm_out(both[:, length:], embedded))
        return outward(unpacked(tokens, height, width))

    def _turns(self, length: int, height: int, width: int) -> Rotary:
        """Return the rotary embedding of text, all of it at the origin, and picture, on rows and columns."""
        rows, columns = (torch.cat([torch.zeros(length), each]) for each in grid(height, width))
        return rotary((torch.zeros_like(rows), rows, columns), self.frequencies)


def _single(block: Any, both: Tensor, embedded: Tensor, turns: Rotary) -> Tensor:
    """Return what a block for text and picture [R, S, E] makes of them; diffusers' takes them apart between blocks."""
    normal, gate = block.norm(both, emb=embedded)
    attended = block.attn(normal, image_rotary_emb=turns)
    beside = block.act_mlp(block.proj_mlp(normal))
    result: Tensor = both + gate[:, None] * block.proj_out(torch.cat([attended, beside], dim=2))
    return result.clip(-LARGEST_HALF, LARGEST_HALF) if result.dtype == torch.float16 else result


def denoiser_graph(transformer: Any, length: int, precision: Precision) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R], conditioning [R, L, E] and [R, P] to the prediction [R, C, h, w].

    A transformer with an embedded guidance scale reads that as well, [R, 1].
    """
    config, dtype = transformer.config, network_dtype(precision)
    latents = ("R", config.in_channels // 4, "h", "w")
    inputs = [
        TensorInfo(name="model_input", dtype=dtype, shape=latents),
        TensorInfo(name="timestep", dtype="float32", shape=("R",)),
        TensorInfo(name="context", dtype=dtype, shape=("R", "L", config.joint_attention_dim)),
        TensorInfo(name="pooled", dtype=dtype, shape=("R", config.pooled_projection_dim)),
    ]
    if config.guidance_embeds:
        inputs.append(TensorInfo(name="guidance", dtype="float32", shape=("R", 1)))
    return Graph(
        "denoiser",
        "step",
        Denoiser(transformer),
        tuple(inputs),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000} | ({"guidance": 10} if config.guidance_embeds else {}),
        usual={"L": length},
        multiples={"h": 2, "w": 2},
    )


LAYOUT = {
    "patch_size": WHOLE,
    "in_channels": WHOLE,
    "out_channels": WHOLE | NULL,
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "attention_head_dim": WHOLE,
    "num_attention_heads": WHOLE,
    "joint_attention_dim": WHOLE,
    "axes_dims_rope": WHOLES,
}
STACKS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
FLUX_TRANSFORMER = diffusers_part(
    "FluxTransformer2DModel",
    "transformers.transformer_flux",
    LAYOUT | {"pooled_projection_dim": WHOLE},
    depth=("num_single_layers",),
    stacks=STACKS,
)
