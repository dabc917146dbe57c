"""Parts of a prompt that fit the text encoder, and the weight of each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...engines.bundle import TokenizerInfo
from ...engines.device import Array
from .tokenizer import Tokenizer

Chunk = tuple[int, ...]
"""L token ids, begin, end and padding among them."""


@dataclass(frozen=True)
class Weighted:
    """A chunk with a weight for each of its tokens."""

    chunk: Chunk
    weights: tuple[float, ...]


class ParsedPrompt(Protocol):
    """A prompt in some syntax, before its chunks are encoded."""

    chunks: list[Chunk]
    parts: int
    """How many chunks long its conditioning is."""

    def conditioning(self, encoded: Mapping[Chunk, Array]) -> Array:
        """Return the prompt's conditioning [n·L, E] from that of its chunks, each [L, E] in float32."""


def takes_chunks(info: TokenizerInfo) -> bool:
    """Tell whether a text can be encoded in parts between a begin and an end, all of one length."""
    framed = info.bos_id is not None and info.eos_id is not None
    return framed and info.template == "{}" and not info.lengths and info.mask_output is None


class Tokens:
    """A tokenizer's tokens as syntaxes need them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.room = tokenizer.info.room
        """Tokens of a text that a chunk holds."""
        self.comma = tokenizer.token_id(",</w>")

    def of(self, text: str) -> list[int]:
        """Return the token ids of a text of any length."""
        return self._tokenizer.text_ids(text)

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids."""
        return [self._tokenizer.token(number) for number in ids]

    def weighted(self, ids: Sequence[tuple[int, float]] = ()) -> Weighted:
        """Return the chunk of ids with their weights; what is put around them weighs 1."""
        assert len(ids) <= self.room
        info = self._tokenizer.info
        assert info.bos_id is not None and info.eos_id is not None
        missing = self.room - len(ids)
        chunk = (info.bos_id, *(number for number, _ in ids), info.eos_id, *[info.pad_id] * missing)
        return Weighted(chunk, (1.0, *(weight for _, weight in ids), *[1.0] * (1 + missing)))
