"""Attention as one ONNX node, which an engine can fuse or expand as it likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WholeAttention:
    """A diffusers attention processor that is traced to one ONNX `Attention` node on [R, L, heads·size] tensors."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return softmax(q·kᵀ/√size)·v after its projections; pictures [R, C, h, w] are attended to pixel by pixel."""
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention.group_norm is not None:
            hidden_states = attention.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attention.to_q(hidden_states)
        hidden_states = torch.onnx.ops.symbolic(
            "Attention",
            (query, attention.to_k(context), attention.to_v(context)),
            attrs={"q_num_heads": attention.heads, "kv_num_heads": attention.heads},
            dtype=query.dtype,
            shape=query.shape,
            version=23,
        )
        hidden_states = attention.to_out[0](hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attention.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attention.rescale_output_factor


def set_whole_attention(module: torch.nn.Module) -> None:
    """Let every diffusers network inside a module be traced with whole attention."""
    for child in module.modules():
        if set_processor := getattr(child, "set_attn_processor", None):
            set_processor(WholeAttention())
