"""transformers' `T5EncoderModel`: T5's encoder alone, whose last hidden states condition FLUX and SD 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.configs import WHOLE
from .parts import transformers_part

HALF_SCALE = 64.0
"""By which a feed-forward layer's last product is smaller in half precision, whose range T5's own would leave."""


class _Norm(nn.Module):
    """T5's norm of float32, in the network's own type; its weight is cast before, as a fused norm takes one type."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [R, L, E] over its root mean square."""
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * (hidden * scale)).to(self.weight.dtype)


class _Scaled(nn.Linear):
    """A linear layer with a float32 output that is exact to half precision, and reaches 64 times its range."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the product; a power of two costs no digits."""
        if self.weight.dtype != torch.float16:
            return super().forward(hidden)
        return super().forward(hidden * (1 / HALF_SCALE)).float() * HALF_SCALE


def prepare(encoder: Any) -> Any:
    """Return the encoder ready for `hidden_states`, for any length and precision.

    Buckets of distances come from a table, because the logarithm that they are rounded from differs between libraries.
    The sum over layers stays in float32, as transformers has it in half precision: it is too large for less.
    """
    for block in encoder.encoder.block:
        block.layer[-1].DenseReluDense.wo.__class__ = _Scaled
    for module in encoder.modules():
        if hasattr(module, "variance_epsilon"):
            module.__class__ = _Norm
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    most = attention.relative_attention_max_distance  # all further ones share a bucket
    buckets = attention._relative_position_bucket(
        torch.arange(-most, most + 1), True, attention.relative_attention_num_buckets, most
    )

    def position_bias(length: int, _: int, **__: Any) -> Tensor:
        positions = torch.arange(length)
        distances = (positions[None, :] - positions[:, None]).clamp(-most, most) + most  # [L, L]
        bias = nn.functional.embedding(distances, attention.relative_attention_bias(buckets))  # [L, L, heads]
        return bias.permute(2, 0, 1)[None]

    attention.compute_bias = position_bias
    return encoder


def hidden_states(encoder: Any, token_ids: Tensor) -> Tensor:
    """Return the last hidden states [R, L, E] of token ids [R, L], padding among them, of a prepared encoder."""
    hidden, bias = encoder.shared(token_ids).float(), None
    for block in encoder.encoder.block:
        hidden, bias, _ = block(hidden, position_bias=bias)
    normal: Tensor = encoder.encoder.final_layer_norm(hidden)
    return normal


T5_ENCODER = transformers_part(
    "T5EncoderModel",
    "T5Config",
    {
        "vocab_size": WHOLE,
        "d_model": WHOLE,
        "d_kv": WHOLE,
        "d_ff": WHOLE,
        "num_layers": WHOLE,
        "num_heads": WHOLE,
        "relative_attention_num_buckets": WHOLE,
        "relative_attention_max_distance": WHOLE,
    },
    # The one embedding has two names, and files have either or both.
    renames=(
        lambda name: name.replace("encoder.embed_tokens.", "shared."),
        lambda name: name.replace("shared.", "encoder.embed_tokens."),
    ),
    depth=("num_layers",),
    stacks={"num_layers": "encoder.block"},
)
