"""Prompts to token ids, in the fixed-length form that CLIP text encoders take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engines.bundle import TokenizerInfo
from ...engines.device import Array
from ...engines.errors import BundleError

Texts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Negative prompts of images, none without guidance, and their prompts, by the source that a tokenizer reads."""


class Encoded(NamedTuple):
    """Token ids of one prompt and the end of it that did not fit."""

    ids: npt.NDArray[np.int64]  # [L]
    truncated: str
    used: int
    """How many ids are tokens; the others fill them up."""
    cut: int
    """How many tokens did not fit."""


class Tokenizer:
    """One tokenizer of a bundle: `tokenizers` file, begin, end and padding tokens, fixed length."""

    def __init__(self, path: Path, info: TokenizerInfo) -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare exceptions
            raise BundleError(f"tokenizer {path} cannot be read ({error}): export the checkpoint again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.info = info
        self._longer = _vectors_of_words(self._tokenizer)
        self.encode_negative = lru_cache(16)(self.encode)
        """As `encode`; for negative prompts, of which most requests have the same few."""

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, however many there are."""
        return self._encoded(text)[0]

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and the character at which each begins; learned words in full."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        if not self._longer:
            return encoding.ids, starts
        pairs = zip(encoding.ids, starts, strict=True)
        each = [(number, start) for found, start in pairs for number in self._longer.get(found, (found,))]
        return [number for number, _ in each], [start for _, start in each]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, number: int) -> str:
        """Return the token of an id of the vocabulary."""
        token: str = self._tokenizer.id_to_token(number)
        return token

    def encode(self, text: str, length: int | None = None) -> Encoded:
        """Return begin + text + end, padded to a length; what does not fit is cut and reported.

        The length is by default the most tokens that a prompt may have.
        """
        info, length = self.info, length or self.info.max_length
        room = info.room_of(length)
        before, _, after = info.template.partition("{}")
        all_ids, starts = self._encoded(f"{before}{text}{after}")
        kept, cut = all_ids[:room], all_ids[room:]
        used = [number for number in (info.bos_id, *kept, info.eos_id) if number is not None]
        ids = np.full(length, info.pad_id, np.int64)
        ids[: len(used)] = used
        left = text[max(0, starts[room] - len(before)) :] if cut else ""
        return Encoded(ids, left, len(used), len(cut))


def _vectors_of_words(tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """Return the ids that stand for learned words of several vectors, as diffusers writes them: `x x_1 x_2`."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    longer = {}
    for token, first in added.items():
        numbers = [first]
        while (following := added.get(f"{token}_{len(numbers)}")) is not None:
            numbers.append(following)
        if len(numbers) > 1:
            longer[first] = tuple(numbers)
    return longer


def row_lengths(
    tokenizers: Sequence[Tokenizer], texts: Callable[[str], Iterable[str]], asked: int | None = None
) -> dict[str, int]:
    """Return how long the rows of token ids are in which all texts of a source fit, by graph input.

    `asked` is the length of rows that may have any, no more than the most.
    """
    lengths = {}
    for tokenizer in tokenizers:
        info = tokenizer.info
        longest = info.max_length
        if info.any_length and asked is not None:
            lengths[info.output] = asked
            continue
        if info.lengths:
            longest = max(tokenizer.encode(text).used for text in set(texts(info.source)))
        lengths[info.output] = next(length for length in (*info.lengths, info.max_length) if length >= longest)
    return lengths


def encode_prompts(
    tokenizers: Sequence[Tokenizer],
    texts: Texts,
    lengths: Mapping[str, int],
    types: Mapping[str, npt.DTypeLike],
    warn: Callable[[str, int], None],
    advice: str = "",
) -> dict[str, Array]:
    """Return token ids [R, L] by graph input, and masks of them, for the texts of images.

    Rows are those of the negative prompts, where there is guidance, and then of the prompts. `lengths` are the tokens
    of a row, `types` those of the arrays, both by graph input. `warn` is told what was cut off, and what to do, and how
    many tokens it is.
    """
    arrays: dict[str, Array] = {}
    for tokenizer in tokenizers:
        info, (negatives, prompts) = tokenizer.info, texts[tokenizer.info.source]
        length = lengths[info.output]
        encoded = {text: tokenizer.encode_negative(text, length) for text in dict.fromkeys(negatives)}
        encoded |= {text: tokenizer.encode(text, length) for text in dict.fromkeys(prompts) if text not in encoded}
        rows = [encoded[text] for text in (*negatives, *prompts)]
        arrays[info.output] = np.stack([row.ids for row in rows])
        if info.mask_output is not None:
            mask = np.arange(length) < np.array([row.used for row in rows])[:, None]
            arrays[info.mask_output] = mask.astype(types[info.mask_output])
        for text, row in encoded.items():
            if row.truncated:
                cut = f"{_short(row.truncated)} is not used{advice}"
                warn(f"prompt {_short(text)} is longer than {info.room_of(length)} tokens: {cut}", row.cut)
    return arrays


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
