"""Prompts to token ids, in the fixed-length form that CLIP text encoders take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engines.bundle import TokenizerInfo
from ...engines.errors import BundleError

log = logging.getLogger(__name__)


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
        self.encode_negative = lru_cache(16)(self.encode)
        """As `encode`; for negative prompts, of which most requests have the same few."""

    def encode(self, text: str) -> Encoded:
        """Return begin + text + end, padded to the fixed length; what does not fit is cut and reported."""
        info = self.info
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = info.max_length - 2
        kept, cut = encoding.ids[:room], encoding.ids[room:]
        ids = np.full(info.max_length, info.pad_id, np.int64)
        ids[: len(kept) + 2] = [info.bos_id, *kept, info.eos_id]
        return Encoded(ids, self._tokenizer.decode(cut) if cut else "")


def encode_prompts(
    tokenizers: Sequence[Tokenizer], images: Sequence[tuple[str, str, int]], branches: int, warnings: list[str]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return token ids [R, L] by graph input for (prompt, negative prompt, seed) images.

    With two guidance branches all negative prompts come first. What was cut off is logged and added to `warnings`.
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
            message = f"prompt {text[:40]!r}… is longer than {room} tokens: {truncated!r} is not used"
            if truncated and message not in warnings:
                warnings.append(message)
                log.warning(message)
    return ids
