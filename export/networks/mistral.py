"""The language model of transformers' Mistral3 as a text encoder: it also sees pictures, which no prompt holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...engines.bundle import Precision
from ..graph import Graph, outward
from .parts import transformers_part
from .qwen import LANGUAGE_MODEL, LAYERS, TextEncoder, text_graph


class FilledOnTheLeft(TextEncoder):
    """As `TextEncoder`, of rows that are filled up before a prompt and not behind it.

    What fills up sees no token that is read, and transformers' attention gives zeros for it: it goes through the
    feed-forward parts alone.
    """

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Return the conditioning [R, L, E] of token ids [R, L], of which the mask counts those that are read."""
        positions = torch.arange(token_ids.shape[1])[None].expand(token_ids.shape)
        count = token_mask.sum(1, keepdim=True)
        filling = token_ids.shape[1] - count
        read = positions >= filling
        hidden = self.encoder.embed_tokens(
            token_ids.gather(1, torch.where(read, positions - filling, positions + count))
        )
        before = positions[:, :, None] >= positions[:, None, :]
        own = positions[:, :, None] == positions[:, None, :]  # no row of a mask may be empty
        mask = torch.logical_or(torch.logical_and(before, read[:, None, :]), own)[:, None]  # [R, 1, L, L]
        rotary, seen, found = self.rotary(positions, hidden.dtype), read[..., None].to(hidden.dtype), {}
        for number, layer in enumerate(self.encoder.layers, start=1):
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
            )
            hidden = hidden + attended * seen
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            found[number] = hidden
        return outward(torch.cat([found[number] for number in self.taken], dim=-1))


def text_encoder_graph(encoder: Any, layers: Sequence[int], precision: Precision, length: int, side: str) -> Graph:
    """Token ids and their mask [R, L] to the hidden states behind `layers` layers [R, L, E], side by side.

    Ids and mask are filled up on the right; what they become has its filling on `side`. `encoder` is the language model
    or, as diffusers opens it, the one of texts and pictures around it.
    """
    whole = getattr(encoder, "model", encoder)
    language = getattr(whole, "language_model", whole)
    module = (FilledOnTheLeft if side == "left" else TextEncoder)(language, layers)
    return text_graph(module, language.config, layers, precision, length)


MISTRAL3 = transformers_part(
    "Mistral3ForConditionalGeneration",
    "MistralConfig",
    LANGUAGE_MODEL,
    network="MistralModel",
    renames=tuple(
        (lambda name, prefix=prefix: f"{prefix}.{name}")
        for prefix in ("model.language_model", "language_model.model", "language_model")
    ),
    section="text_config",
    **LAYERS,
)
