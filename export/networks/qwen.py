"""transformers' Qwen3 as a text encoder: hidden states behind some of its layers, of a prompt as a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ...engines.errors import UnsupportedModelError
from ..checkpoints.configs import SCALE, WHOLE, Kind, shown
from ..graph import Graph, network_dtype, outward
from .conversation import conversation
from .parts import transformers_part

USUAL_TOKENS = 64
"""What most prompts fit in, where rows are of several lengths."""


class TextEncoder(nn.Module):
    """Qwen3's hidden states behind some of its layers, side by side; layers behind the last of them are let go.

    Positions are [R, L]: rotary embeddings with rows of their own are what engines know. Their frequencies are a
    constant, which no precision rounds.
    """

    encoder: Any

    def __init__(self, encoder: Any, layers: Sequence[int]) -> None:
        super().__init__()
        encoder = getattr(encoder, "model", encoder)
        self.taken = [min(count, len(encoder.layers)) for count in layers]
        encoder.layers = encoder.layers[: max(self.taken)]
        rotary, encoder.norm, encoder.rotary_emb = encoder.rotary_emb, None, None
        self.frequencies = torch.cat([rotary.inv_freq.float()] * 2)
        self.scaling: float = rotary.attention_scaling
        self.encoder = encoder

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Return the conditioning [R, L, E] of token ids [R, L], of which the mask counts those that are read."""
        positions = torch.arange(token_ids.shape[1])[None].expand(token_ids.shape)
        read = positions < token_mask.sum(1, keepdim=True)
        before = positions[:, :, None] >= positions[:, None, :]
        mask = torch.logical_and(before, read[:, None, :])[:, None]  # [R, 1, L, L]
        hidden = self.encoder.embed_tokens(token_ids)
        rotary, found = self.rotary(positions, hidden.dtype), {}
        for number, layer in enumerate(self.encoder.layers, start=1):
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            found[number] = hidden
        return outward(torch.cat([found[number] for number in self.taken], dim=-1))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the angles of positions [R, L]."""
        angles = positions[..., None].float() * self.frequencies
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def text_encoder_graph(encoder: Any, layers: Sequence[int], precision: Precision, usual: int = USUAL_TOKENS) -> Graph:
    """Token ids and their mask [R, L] to the hidden states behind `layers` layers [R, L, E], side by side.

    `usual` is what most requests give to L. A token of the mask is 1; behind the last there are zeros.
    """
    return text_graph(TextEncoder(encoder, layers), encoder.config, layers, precision, usual)


def text_graph(module: nn.Module, config: Any, layers: Sequence[int], precision: Precision, usual: int) -> Graph:
    """Return the graph of a text encoder with a transformers config; see `text_encoder_graph`."""
    return Graph(
        "text_encoder",
        "prompt",
        module,
        (
            TensorInfo(name="token_ids", dtype="int64", shape=("R", "L")),
            TensorInfo(name="token_mask", dtype="int64", shape=("R", "L")),
        ),
        (
            TensorInfo(
                name="context", dtype=network_dtype(precision), shape=("R", "L", len(layers) * config.hidden_size)
            ),
        ),
        limits={"token_ids": config.vocab_size, "token_mask": 2},
        usual={"L": usual},
    )


def check_encoder(config: Mapping[str, Any], layers: Sequence[int], where: str) -> None:
    """Raise `UnsupportedModelError` for an encoder that has no hidden states behind so many layers, or windows."""
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UnsupportedModelError(f"{where}: attention in sliding windows is not supported")
    if not 1 <= min(layers) <= max(layers) < config["num_hidden_layers"]:
        raise UnsupportedModelError(
            f"{where}: num_hidden_layers is {shown(config['num_hidden_layers'])} where what {max(layers)} layers give "
            "is taken before the last"
        )


def chat_template(folder: Path, *, thinking: bool) -> str:
    """Return what a tokenizer's chat template makes of a prompt, `{}`, that waits for an answer.

    Raises as `conversation` does, and `UnsupportedModelError` where prompts are filled up on the left.
    """
    template, side, _ = conversation(
        folder,
        "Qwen2TokenizerFast",
        lambda prompt: [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    if side != "right":
        raise UnsupportedModelError(f"{folder}: prompts are filled up on the left, where the right is supported")
    return template


LANGUAGE_MODEL: Mapping[str, Kind] = {
    "vocab_size": WHOLE,
    "hidden_size": WHOLE,
    "intermediate_size": WHOLE,
    "num_hidden_layers": WHOLE,
    "num_attention_heads": WHOLE,
    "num_key_value_heads": WHOLE,
    "rms_norm_eps": SCALE,
}
"""What this package reads of the config of a language model."""
LAYERS: dict[str, Any] = {"depth": ("num_hidden_layers",), "stacks": {"num_hidden_layers": "layers"}}

QWEN3 = transformers_part(
    "Qwen3Model",
    "Qwen3Config",
    {**LANGUAGE_MODEL, "head_dim": WHOLE},
    fixed={"layer_types": None},
    renames=(lambda name: f"model.{name}",),  # files of the whole language model
    **LAYERS,
)
QWEN3_CAUSAL = replace(QWEN3, class_name="Qwen3ForCausalLM")
