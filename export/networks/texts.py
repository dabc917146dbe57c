"""Several text encoders as one graph: CLIP's and T5's, side by side or one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...engines.bundle import Precision, TensorInfo
from ..graph import Graph, network_dtype, outward
from .clip import before_last
from .t5 import hidden_states, prepare

T5_TOKENS = 256
"""Of Stable Diffusion 3, of padding where T5 is missing."""


class ClipAndT5(nn.Module):
    """T5's last hidden states, and CLIP's embedding of the whole text."""

    def __init__(self, clip: Any, t5: Any) -> None:
        super().__init__()
        self.clip, self.t5 = clip, prepare(t5)

    def forward(self, token_ids: Tensor, token_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]."""
        return outward(hidden_states(self.t5, token_ids_2)), outward(self.clip(token_ids).pooler_output)


class ClipsAndT5(nn.Module):
    """CLIP's last but one layers side by side, with T5's last hidden states behind them; zeros fill up both."""

    def __init__(self, clips: list[Any], t5: Any | None, width: int) -> None:
        super().__init__()
        self.clips, self.t5, self.width = nn.ModuleList(clips), None if t5 is None else prepare(t5), width

    def forward(
        self, token_ids: Tensor, token_ids_2: Tensor, token_ids_3: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]."""
        found = [before_last(clip, ids) for clip, ids in zip(self.clips, (token_ids, token_ids_2), strict=True)]
        clips, pooled = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
        clips = nn.functional.pad(clips, (0, self.width - clips.shape[-1]))
        if self.t5 is None or token_ids_3 is None:
            return outward(nn.functional.pad(clips, (0, 0, 0, T5_TOKENS))), outward(pooled)
        behind = hidden_states(self.t5, token_ids_3).to(clips.dtype)
        return outward(torch.cat([clips, behind], dim=1)), outward(pooled)


class Clips(nn.Module):
    """CLIP's last but one layers side by side, and the projected embedding of the last encoder."""

    def __init__(self, encoders: list[Any]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(
        self, token_ids: Tensor | None = None, token_ids_2: Tensor | None = None, text_given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]; zeros where `text_given` [R, 1] is."""
        ids = [each for each in (token_ids, token_ids_2) if each is not None]
        found = [before_last(encoder, each) for encoder, each in zip(self.encoders, ids, strict=True)]
        context, pooled = torch.cat([hidden for hidden, _ in found], dim=-1), found[-1][1]
        if text_given is not None:
            context, pooled = context * text_given[:, :, None].to(context.dtype), pooled * text_given.to(pooled.dtype)
        return outward(context), outward(pooled)


def texts_graph(
    module: nn.Module,
    tokens: Mapping[str, tuple[int | str, int]],
    context: tuple[int | str, int],
    pooled: int,
    precision: Precision,
    beside: Sequence[TensorInfo] = (),
    usual: Mapping[str, int] | None = None,
) -> Graph:
    """Token ids [R, L] of each tokenizer to the conditioning [R, L, E] and the pooled one [R, P].

    `tokens` are the length and the size of the vocabulary, by graph input; `context` is L and E. Lengths may be
    letters, which `usual` has values of.
    """
    dtype = network_dtype(precision)
    ids = [TensorInfo(name=name, dtype="int64", shape=("R", length)) for name, (length, _) in tokens.items()]
    return Graph(
        "text_encoder",
        "prompt",
        module,
        (*ids, *beside),
        (
            TensorInfo(name="context", dtype=dtype, shape=("R", *context)),
            TensorInfo(name="pooled", dtype=dtype, shape=("R", pooled)),
        ),
        limits={name: vocabulary for name, (_, vocabulary) in tokens.items()},
        usual=usual or {},
    )
