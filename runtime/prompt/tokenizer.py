"""Prompts to token ids, in the fixed-length form that CLIP text encoders take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engines.bundle import TokenizerInfo
from ...engines.errors import BundleError


class Encoded(NamedTuple):
    """Token ids of one prompt and the end of it that did not fit."""

    ids: npt.NDArray[np.int64]  # [L]
    truncated: str


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

    def encode(self, text: str) -> Encoded:
        """Return begin + text + end, padded to the fixed length; what does not fit is cut and reported."""
        info = self.info
        room, (all_ids, starts) = info.max_length - 2, self._encoded(text)
        kept, cut = all_ids[:room], all_ids[room:]
        ids = np.full(info.max_length, info.pad_id, np.int64)
        ids[: len(kept) + 2] = [info.bos_id, *kept, info.eos_id]
        return Encoded(ids, text[starts[room] :] if cut else "")


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


def encode_prompts(
    tokenizers: Sequence[Tokenizer],
    images: Sequence[tuple[str, str, int]],
    branches: int,
    warn: Callable[[str], None],
    advice: str = "",
) -> dict[str, npt.NDArray[np.int64]]:
    """Return token ids [R, L] by graph input for (prompt, negative prompt, seed) images.

    With two guidance branches all negative prompts come first. `warn` is told what was cut off, and what to do.
    """
    texts = [prompt for prompt, _, _ in images]
    negatives = [negative for _, negative, _ in images] if branches == 2 else []
    ids = {}
    for tokenizer in tokenizers:
        encoded = {text: tokenizer.encode_negative(text) for text in dict.fromkeys(negatives)}
        encoded |= {text: tokenizer.encode(text) for text in dict.fromkeys(texts) if text not in encoded}
        ids[tokenizer.info.output] = np.stack([encoded[text].ids for text in negatives + texts])
        for text, (_, truncated) in encoded.items():
            room = tokenizer.info.max_length - 2
            if truncated:
                warn(f"prompt {_short(text)} is longer than {room} tokens: {_short(truncated)} is not used{advice}")
    return ids


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
