"""diffusers' `SD3Transformer2DModel` as the graph that runs once for each step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..checkpoints.configs import NULL, WHOLE
from ..graph import Graph, inward, network_dtype, outward
from .parts import diffusers_part


class _Patches(nn.Module):
    """Squares of latents as tokens, with the middle of a table of positions added.

    The table [N, N, E] is sines and cosines of the column in one half and of the row in the other: two lines of it say
    all. They are constants of the graph.
    """

    def __init__(self, embed: Any, where: str) -> None:
        super().__init__()
        self.proj, self.side, most = embed.proj, embed.patch_size, embed.pos_embed_max_size
        table = embed.pos_embed.float().reshape(most, most, -1)
        half = table.shape[2] // 2
        self.columns, self.rows = table[0, :, :half].clone(), table[:, 0, half:].clone()
        self.most = most
        if not torch.equal(self._of(torch.arange(most), torch.arange(most)), table):
            raise ValueError(f"{where}: pos_embed is no table of sines and cosines of columns and rows")

    def forward(self, latents: Tensor) -> Tensor:
        """Return the tokens [R, h·w / side², E] of latents [R, C, h, w]."""
        down, across = (size // self.side for size in latents.shape[-2:])
        tokens = self.proj(latents).flatten(2).transpose(1, 2)
        y, x = (torch.arange(size) + (self.most - size) // 2 for size in (down, across))
        return tokens + self._of(y, x).flatten(0, 1)[None].to(tokens.dtype)

    def _of(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the embeddings [h, w, E] of rows y [h] and columns x [w]."""
        columns, rows = nn.functional.embedding(x, self.columns), nn.functional.embedding(y, self.rows)
        shape = (y.shape[0], x.shape[0], -1)  # the length of a tensor would be fixed in a trace
        return torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=-1)


class Denoiser(nn.Module):
    """The transformer for every latent size up to that of its table of positions.

    Its squares become latents by a permutation, as operators for sums of products know no bfloat16. The layers `skips`
    are left out in rows that say so.
    """

    transformer: Any

    def __init__(self, transformer: Any, skips: Collection[int]) -> None:
        super().__init__()
        self.skips = skips
        transformer.pos_embed = _Patches(transformer.pos_embed, "SD3Transformer2DModel")
        self.transformer = transformer

    def forward(
        self, model_input: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, skipped: Tensor | None = None
    ) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        net, inside = self.transformer, self.transformer.dtype
        hidden, behind = net.pos_embed(inward(model_input, inside)), net.context_embedder(inward(context, inside))
        moment = net.time_text_embed(timestep, inward(pooled, inside))
        for number, block in enumerate(net.transformer_blocks):
            before = behind, hidden
            behind, hidden = block(hidden_states=hidden, encoder_hidden_states=behind, temb=moment)
            if skipped is not None and number in self.skips:
                left_out = skipped[:, None, None] > 0
                hidden = torch.where(left_out, before[1], hidden)
                behind = None if behind is None else torch.where(left_out, before[0], behind)  # the last gives no text
        squares = net.proj_out(net.norm_out(hidden, moment))
        rows, channels, height, width = model_input.shape
        side = net.config.patch_size
        squares = squares.view(rows, height // side, width // side, side, side, channels)
        return outward(squares.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, height, width))


def denoiser_graph(transformer: Any, length: int, precision: Precision, skips: Sequence[int]) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R], texts [R, L, E] and whole ones [R, P] to the prediction [R, C, h, w].

    `length` is the usual L. With layers that it `skips` it also reads [R], 1 in rows without those; of a copy of few
    layers the last stands for all that it lacks.
    """
    config, dtype = transformer.config, network_dtype(precision)
    latents = ("R", config.in_channels, "h", "w")
    return Graph(
        "denoiser",
        "step",
        Denoiser(transformer, {min(layer, config.num_layers - 1) for layer in skips}),
        (
            TensorInfo(name="model_input", dtype=dtype, shape=latents),
            TensorInfo(name="timestep", dtype="float32", shape=("R",)),
            TensorInfo(name="context", dtype=dtype, shape=("R", "L", config.joint_attention_dim)),
            TensorInfo(name="pooled", dtype=dtype, shape=("R", config.pooled_projection_dim)),
            *((TensorInfo(name="skipped", dtype="int64", shape=("R",)),) if skips else ()),
        ),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000} | ({"skipped": 2} if skips else {}),
        multiples={"h": config.patch_size, "w": config.patch_size},
        usual={"L": length},
    )


SD3_TRANSFORMER = diffusers_part(
    "SD3Transformer2DModel",
    "transformers.transformer_sd3",
    {
        "sample_size": WHOLE,
        "patch_size": WHOLE,
        "in_channels": WHOLE,
        "out_channels": WHOLE | NULL,
        "num_layers": WHOLE,
        "attention_head_dim": WHOLE,
        "num_attention_heads": WHOLE,
        "joint_attention_dim": WHOLE,
        "caption_projection_dim": WHOLE,
        "pooled_projection_dim": WHOLE,
        "pos_embed_max_size": WHOLE,
    },
    depth=("num_layers",),
    stacks={"num_layers": "transformer_blocks"},
)
