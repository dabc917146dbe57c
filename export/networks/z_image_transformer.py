"""diffusers' `ZImageTransformer2DModel` for batches: rows of pictures and captions in place of lists of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..checkpoints.configs import NUMBER, WHOLE, WHOLES
from ..graph import Graph, inward, network_dtype, outward
from .parts import diffusers_part
from .qwen import USUAL_TOKENS

MULTIPLE = 32
"""Pictures' and captions' tokens are filled up to multiples of this, with tokens that are learned."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of rotary embeddings, [R, N, D / 2] each."""


class _Attention:
    """Self-attention whose queries and keys are rotated in real numbers, in float32."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Rotary | None = None,
    ) -> Tensor:
        """Return [R, N, E]; the mask [R, 1, N, N] tells what queries see."""
        parts = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (part(hidden_states).unflatten(-1, (attn.heads, -1)) for part in parts)
        query, key = (
            _rotated(each if norm is None else norm(each), freqs_cis)
            for each, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))
        return out


def _rotated(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """Return [R, N, heads, D] with each pair of neighbours turned by its angle."""
    assert rotary is not None
    cos, sin = (each[:, :, None] for each in rotary)
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(heads)


class Denoiser(nn.Module):
    """The transformer over a picture's tokens and those of a caption behind them."""

    transformer: Any

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        config = transformer.config
        # they are read here, so that they are this module's own
        self.picture_pad, self.caption_pad = transformer.x_pad_token, transformer.cap_pad_token
        transformer.x_pad_token = transformer.cap_pad_token = None
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.processor = _Attention()
        tables = transformer.rope_embedder.precompute_freqs_cis(config.axes_dims, config.axes_lens, config.rope_theta)
        self.tables = [(table.real.contiguous(), table.imag.contiguous()) for table in tables]
        half = transformer.t_embedder.frequency_embedding_size // 2
        self.frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.transformer = transformer

    def forward(self, model_input: Tensor, timestep: Tensor, context: Tensor, token_mask: Tensor) -> Tensor:
        """Return the prediction [R, C, h, w]; the mask [R, L] counts the tokens of a caption."""
        net, inside = self.transformer, self.picture_pad.dtype
        rows, channels, height, width = model_input.shape
        down, across = height // 2, width // 2
        moment = net.t_embedder.mlp(self._of_time(timestep).to(inside))

        patches = inward(model_input, inside).view(rows, channels, down, 2, across, 2)
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(rows, down * across, 4 * channels)
        count = down * across
        places = torch.arange((count + MULTIPLE - 1) // MULTIPLE * MULTIPLE)
        own = places < count
        source = places * own  # what fills up is written over
        picture = net.all_x_embedder["2-1"](patches).index_select(1, source)
        picture = torch.where(own[None, :, None], picture, self.picture_pad)

        words = token_mask.sum(1, keepdim=True)  # [R, 1]
        total = (words + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        order = torch.arange(context.shape[1])[None].expand(token_mask.shape)
        caption = net.cap_embedder(inward(context, inside))
        caption = torch.where((order < words)[:, :, None], caption, self.caption_pad)

        y = torch.arange(down)[:, None].expand(down, across).reshape(-1).index_select(0, source) * own
        x = torch.arange(across)[None, :].expand(down, across).reshape(-1).index_select(0, source) * own
        whole = own[None].expand(rows, -1)
        of_picture = self._rotary((total + 1) * whole, y * whole, x * whole)
        of_caption = self._rotary(order + 1, order * 0, order * 0)

        for block in net.noise_refiner:
            picture = block(picture, None, of_picture, moment)
        seen = (order < total)[:, None, None]  # [R, 1, 1, L]
        among = seen.expand(-1, -1, context.shape[1], -1)
        for block in net.context_refiner:
            caption = block(caption, among, of_caption)
        hidden = torch.cat([picture, caption], dim=1)
        rotary = tuple(torch.cat(pair, dim=1) for pair in zip(of_picture, of_caption, strict=True))
        seen = torch.cat([torch.ones_like(whole)[:, None, None], seen], dim=-1).expand(-1, -1, hidden.shape[1], -1)
        for block in net.layers:
            hidden = block(hidden, seen, rotary, moment)

        flow = net.all_final_layer["2-1"](hidden[:, :count], c=moment)
        flow = flow.view(rows, down, across, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        return outward(-flow.reshape(rows, channels, height, width))

    def _of_time(self, timestep: Tensor) -> Tensor:
        """Return the embedding of the time that the network knows: 0 for noise, its scale for a picture."""
        moment = (timestep - 1000) / -1000 * self.transformer.t_scale
        angles = moment[:, None] * self.frequencies[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def _rotary(self, *places: Tensor) -> Rotary:
        """Return the rotary embeddings of tokens at places [R, N] on each axis."""
        found = [
            [nn.functional.embedding(place, table) for place, table in zip(places, tables, strict=True)]
            for tables in zip(*self.tables, strict=True)
        ]
        return torch.cat(found[0], dim=-1), torch.cat(found[1], dim=-1)


def denoiser_graph(transformer: Any, precision: Precision) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R], captions [R, L, E] and their mask to the prediction [R, C, h, w]."""
    config, dtype = transformer.config, network_dtype(precision)
    latents = ("R", config.in_channels, "h", "w")
    return Graph(
        "denoiser",
        "step",
        Denoiser(transformer),
        (
            TensorInfo(name="model_input", dtype=dtype, shape=latents),
            TensorInfo(name="timestep", dtype="float32", shape=("R",)),
            TensorInfo(name="context", dtype=dtype, shape=("R", "L", config.cap_feat_dim)),
            TensorInfo(name="token_mask", dtype="int64", shape=("R", "L")),
        ),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000, "token_mask": 2},
        multiples={"h": 2, "w": 2},
        usual={"L": USUAL_TOKENS},
    )


Z_IMAGE_TRANSFORMER = diffusers_part(
    "ZImageTransformer2DModel",
    "transformers.transformer_z_image",
    {
        "all_patch_size": WHOLES,
        "all_f_patch_size": WHOLES,
        "in_channels": WHOLE,
        "dim": WHOLE,
        "n_layers": WHOLE,
        "n_refiner_layers": WHOLE,
        "n_heads": WHOLE,
        "n_kv_heads": WHOLE,
        "cap_feat_dim": WHOLE,
        "rope_theta": NUMBER,
        "t_scale": NUMBER,
        "axes_dims": WHOLES,
        "axes_lens": WHOLES,
    },
    depth=("n_layers",),
    stacks={"n_layers": "layers"},
)
