"""Compel's prompt syntax: words and phrases with weights, blends of prompts, and prompts side by side.

`word+` weighs 1.1, `word--` 0.9², `(two words)1.3` and `"two words"1.3` what they say; `("a", "b").blend(0.7, 0.3)`
mixes, `("a", "b").and()` puts side by side. Behaves as `Compel(truncate_long_prompts=False)` with
`DownweightMode.REMOVE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...engines.device import Array
from .chunks import Chunk, Tokens, Weighted
from .compel_parser import Fragment, parse

ENDS: Sequence[Callable[[str], bool]] = (
    lambda token: token == ".</w>",
    lambda token: token in (".</w>", ",</w>", ";</w>", ":</w>"),
    lambda token: token.endswith("</w>"),
)
"""Where a long prompt is cut: after the last sentence that fits, else the last phrase, else the last word."""

LEAST = 1e-5
"""The weight that stands for 0."""


@dataclass(frozen=True)
class _Variant:
    """A prompt with or without some words, as chunks, and how much of the mean it is."""

    parts: list[Weighted]
    share: float


class CompelPrompt:
    """A parsed prompt: its chunks, and what becomes of their conditioning."""

    def __init__(self, text: str, tokens: Tokens) -> None:
        """Parse a prompt; raises `RequestError` for operators that change a picture while it is drawn."""
        self._empty = tokens.weighted().chunk
        self._parsed = parse(text)
        self._variants = [
            [_variants(fragments, tokens) for fragments in blend.prompts] for blend in self._parsed.blends
        ]
        parts = [p for blend in self._variants for prompt in blend for variant in prompt for p in variant.parts]
        self.chunks: list[Chunk] = list(dict.fromkeys(part.chunk for part in parts))
        self.parts = sum(max(len(v.parts) for prompt in blend for v in prompt) for blend in self._variants)

    def conditioning(self, encoded: Mapping[Chunk, Array]) -> Array:
        """Return the conditioning [n·L, E]: blends one behind the other."""
        empty, found = encoded[self._empty], []
        for blend, prompts, weight in zip(self._parsed.blends, self._variants, self._parsed.weights, strict=True):
            whole = [self._mean([(v.share, self._weighted(v, encoded)) for v in each], empty, True) for each in prompts]
            mixed = self._mean(list(zip(blend.weights, whole, strict=True)), empty, blend.normalized)
            base = np.concatenate([empty] * (len(mixed) // len(empty)))
            found.append(mixed if weight == 1 else base + (mixed - base) * weight)
        return np.concatenate(found)

    def _weighted(self, variant: _Variant, encoded: Mapping[Chunk, Array]) -> Array:
        """Return a variant's conditioning, each token's moved from the empty prompt's by its weight."""
        empty, parts = encoded[self._empty], []
        for part in variant.parts:
            own, weights = encoded[part.chunk], np.array(part.weights, np.float32)[:, None]
            parts.append(np.where(weights == 1, own, empty + (own - empty) * weights))
        return np.concatenate(parts)

    def _mean(self, shares: Sequence[tuple[float, Array]], empty: Array, normalized: bool) -> Array:
        """Return a weighted sum of conditionings, all as long as the longest; `normalized` divides by the weights."""
        most = max(len(each) for _, each in shares)
        padded = [np.concatenate([each, *[empty] * ((most - len(each)) // len(empty))]) for _, each in shares]
        weights = np.array([share for share, _ in shares], np.float32)
        weights = weights / weights.sum() if normalized else weights
        mean: Array = np.tensordot(weights, np.stack(padded), 1)
        return mean


def _variants(fragments: Sequence[Fragment], tokens: Tokens) -> list[_Variant]:
    """Return a prompt as it is, and once without each fragment that weighs less than 1."""
    variants = [_Variant(_parts(fragments, tokens), 1.0)]
    for number, fragment in enumerate(fragments):
        if fragment.weight < 1:
            others = [*fragments[:number], *fragments[number + 1 :]]
            share = math.tan((1 - max(LEAST, fragment.weight)) * math.pi / 2)
            variants.append(_Variant(_parts(others, tokens), share))
    return variants


def _parts(fragments: Sequence[Fragment], tokens: Tokens) -> list[Weighted]:
    """Return the chunks of a prompt of any length."""
    ids = [(number, each.weight) for each in fragments for number in tokens.of(each.text)]
    parts = []
    while len(ids) > tokens.room:
        names = tokens.names([number for number, _ in ids[: tokens.room]])
        ends = ([i for i, name in enumerate(names) if is_end(name)] for is_end in ENDS)
        cut = next((found[-1] + 1 for found in ends if found), tokens.room)
        parts.append(tokens.weighted(ids[:cut]))
        ids = ids[cut:]
    if ids or not parts:
        parts.append(tokens.weighted(ids))
    return parts
