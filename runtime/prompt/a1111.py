"""The prompt syntax of AUTOMATIC1111's web UI: weights in brackets, and prompts of any length in parts.

`(word)` weighs 1.1, `[word]` 1/1.1, `(word:1.3)` what it says, and brackets inside brackets multiply; `\\(` is a
bracket as such. `BREAK` begins a new part. Behaves as `parse_prompt_attention` and the "Original" emphasis there do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...engines.device import Array
from ...engines.errors import RequestError
from .chunks import Chunk, Tokens, Weighted

STRONGER = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""

BACKTRACK = 20
"""Tokens after the last comma of a full part that move to the next one together with what did not fit."""

_MARK = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_UNSUPPORTED = {
    "the network <{}:…>": re.compile(r"<(lora|lyco|hypernet):"),
    "{}, several prompts at once": re.compile(r"\b(AND(?:_PERP|_SALT|_TOPK)?)\b"),
}
_EDITED = re.compile(r"\||:\s*[+-]?[.\d]+\s*$")
"""What makes square brackets say which words are used at which step."""


@dataclass
class _Piece:
    text: str | None
    """None where a new part begins."""
    weight: float = 1.0


class A1111Prompt:
    """A parsed prompt: its chunks, and what becomes of their conditioning."""

    def __init__(self, text: str, tokens: Tokens) -> None:
        """Parse a prompt; raises `RequestError` for what the web UI has beyond weights and parts."""
        self._parts = list(_parts(_pieces(text), tokens))
        self.chunks: list[Chunk] = [part.chunk for part in self._parts]
        self.parts = len(self._parts)

    def conditioning(self, encoded: Mapping[Chunk, Array]) -> Array:
        """Return the conditioning [n·L, E]: each part's, multiplied by its weights and brought back to its old mean."""
        return np.concatenate([_emphasized(encoded[part.chunk], part.weights) for part in self._parts])


def _emphasized(conditioning: Array, weights: tuple[float, ...]) -> Array:
    weighted = conditioning * np.array(weights, np.float32)[:, None]
    return weighted * (conditioning.mean() / weighted.mean())


def _pieces(prompt: str) -> list[_Piece]:
    """Return the texts of a prompt with their weights, runs of one weight together."""
    for what, pattern in _UNSUPPORTED.items():
        if found := pattern.search(prompt):
            raise _refused(prompt, what.format(found[1]))
    pieces: list[_Piece] = []
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # piece and character after each open bracket

    def multiply(first: int, factor: float) -> None:
        for piece in pieces[first:]:
            piece.weight *= factor

    for mark in _MARK.finditer(prompt):
        kind, said = mark.lastgroup, mark[0]
        if kind == "escaped":
            pieces.append(_Piece(mark["escaped"]))
        elif kind == "open":
            opened[said].append((len(pieces), mark.end()))
        elif kind == "weight" and opened["("]:
            multiply(opened["("].pop()[0], _number(prompt, mark["weight"]))
        elif said == ")" and opened["("]:
            multiply(opened["("].pop()[0], STRONGER)
        elif said == "]" and opened["["]:
            first, start = opened["["].pop()
            if _EDITED.search(prompt[start : mark.start()]):
                raise _refused(prompt, f"{prompt[start - 1 : mark.end()]!r}, words that change from step to step")
            multiply(first, 1 / STRONGER)
        else:
            pieces += _broken(said)
    for bracket, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        for first, _ in opened[bracket]:
            multiply(first, factor)
    return _merged(pieces)


def _broken(text: str) -> Iterator[_Piece]:
    for number, part in enumerate(_BREAK.split(text)):
        if number:
            yield _Piece(None)
        yield _Piece(part)


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    merged: list[_Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.text is not None and piece.text is not None and last.weight == piece.weight:
            last.text += piece.text
        else:
            merged.append(piece)
    return merged


def _parts(pieces: list[_Piece], tokens: Tokens) -> Iterator[Weighted]:
    """Yield the parts of a prompt: cut at `BREAK` and when full, then after a comma where one is near."""
    ids: list[tuple[int, float]] = []
    comma, comma_at, yielded = tokens.comma, None, False
    for piece in pieces:
        if piece.text is None:
            yield tokens.weighted(ids)
            ids, comma_at, yielded = [], None, True
            continue
        for token in tokens.of(piece.text):
            if token == comma:
                comma_at = len(ids)
            elif len(ids) == tokens.room and comma_at is not None and len(ids) - comma_at <= BACKTRACK:
                yield tokens.weighted(ids[: comma_at + 1])
                ids, comma_at, yielded = ids[comma_at + 1 :], None, True
            if len(ids) == tokens.room:
                yield tokens.weighted(ids)
                ids, comma_at, yielded = [], None, True
            ids.append((token, piece.weight))
    if ids or not yielded:
        yield tokens.weighted(ids)


def _number(prompt: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"prompt {prompt[:60]!r} has the weight {text[:20]!r}: give a number, such as 1.2")
    return value


def _refused(prompt: str, what: str) -> RequestError:
    return RequestError(
        f"prompt {prompt[:60]!r} has {what}, which latentrt does not know: prompt_syntax a1111 takes weights and BREAK"
    )
