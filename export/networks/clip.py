"""transformers' `CLIPTextModel` as a graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..checkpoints.configs import WHOLE
from ..graph import Graph, network_dtype, outward
from .parts import transformers_part


class TextEncoder(nn.Module):
    """CLIP's last hidden state, after the final layer norm."""

    encoder: Any

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the conditioning [R, L, E] of token ids [R, L]."""
        return outward(self.encoder(token_ids, return_dict=False)[0])


def text_encoder_graph(encoder: Any, length: int, precision: Precision) -> Graph:
    """Token ids [R, L] to conditioning [R, L, E]."""
    config = encoder.config
    return Graph(
        "text_encoder",
        "prompt",
        TextEncoder(encoder),
        (TensorInfo(name="token_ids", dtype="int64", shape=("R", length)),),
        (TensorInfo(name="context", dtype=network_dtype(precision), shape=("R", length, config.hidden_size)),),
        limits={"token_ids": config.vocab_size},
    )


def before_last(encoder: Any, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what comes out of CLIP's last but one layer [R, L, E], and its first output: the pooled one, if any."""
    outputs = encoder(token_ids, output_hidden_states=True)
    return outputs.hidden_states[-2], outputs[0]


CLIP_TEXT = transformers_part(
    "CLIPTextModel",
    "CLIPTextConfig",
    {
        "vocab_size": WHOLE,
        "hidden_size": WHOLE,
        "intermediate_size": WHOLE,
        "num_hidden_layers": WHOLE,
        "num_attention_heads": WHOLE,
        "max_position_embeddings": WHOLE,
    },
    # Files and modules have or lack the prefix, depending on the version of transformers.
    renames=(lambda name: f"text_model.{name}", lambda name: name.removeprefix("text_model.")),
    depth=("num_hidden_layers",),
    section="text_config",
)

CLIP_TEXT_PROJECTION = transformers_part(
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    {**CLIP_TEXT.kinds, "projection_dim": WHOLE},
    renames=CLIP_TEXT.renames,
    depth=CLIP_TEXT.depth,
    section=CLIP_TEXT.section,
)
