"""Standard normal noise that equals PyTorch's CPU generator, draw for draw.

A seed then means the same picture here and in diffusers. The generator is MT19937 seeded with the low 32 bits of the
seed. A draw of 16 values or more takes one 24-bit uniform per value and turns blocks of 16 into normals (Box-Muller,
cosines before sines); when the count is not a multiple of 16, sixteen new uniforms replace the last sixteen values. A
shorter draw takes two 53-bit uniforms per pair of normals and keeps the second normal of a pair for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError

__all__ = ["Generator", "randn"]

BLOCK = 16
SEED_LIMIT = 2**64


class Generator:
    """A seeded stream of normals; consecutive draws continue it as `torch.Generator().manual_seed(seed)` would.

    Raises RequestError for a seed outside 0 .. 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._mt19937 = np.random.RandomState(0)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin the stream of a seed; raises RequestError as the constructor does."""
        self.seed = checked_seed(seed)
        self._mt19937.seed(self.seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def resume(self, seed: int, words: NDArray[np.uint32], position: int, spare: float | None) -> None:
        """Go on from a state of the Mersenne Twister: its 624 words, the next one to use, a normal left over."""
        self.seed, self._spare = seed, spare
        self._mt19937.set_state(("MT19937", words, position, 0, 0.0))

    def state(self) -> tuple[NDArray[np.uint32], int, float | None]:
        """Return what `resume` takes: the words, the next one to use, and a normal left over."""
        state: Any = self._mt19937.get_state(legacy=False)["state"]
        return state["key"], int(state["pos"]), self._spare

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw standard normals, float32, of the given shape; agrees with torch to 1e-6."""
        count = int(np.prod(shape, dtype=np.int64))
        values = self._blocks(count) if count >= BLOCK else self._scalars(count)
        return values.reshape(tuple(shape))

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._mt19937.randint(0, 2**32, count, dtype=np.uint32)

    def _blocks(self, count: int) -> NDArray[np.float32]:
        whole, rest = divmod(count, BLOCK)
        uniforms = self._words(count)
        values = np.empty(count, np.float32)
        values[: whole * BLOCK] = box_muller(uniforms[: whole * BLOCK])
        if rest:
            values[-BLOCK:] = box_muller(self._words(BLOCK))
        return values

    def _scalars(self, count: int) -> NDArray[np.float32]:
        values = np.empty(count, np.float32)
        for i in range(count):
            if self._spare is not None:
                values[i], self._spare = self._spare, None
                continue
            high1, low1, high2, low2 = (int(word) for word in self._words(4))
            angle = 2 * np.pi * (((high1 << 32 | low1) & (2**53 - 1)) * 2.0**-53)
            radius = np.sqrt(-2 * np.log1p(-(((high2 << 32 | low2) & (2**53 - 1)) * 2.0**-53)))
            values[i], self._spare = radius * np.cos(angle), float(radius * np.sin(angle))
        return values


def randn(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Draw the first normals of a seed, float32, in the given shape.

    Raises RequestError for a seed outside 0 .. 2^64 - 1.
    """
    return Generator(seed).randn(shape)


def checked_seed(seed: int) -> int:
    """Return the seed as an int; raises RequestError unless it is a whole number in 0 .. 2^64 - 1."""
    try:
        value = index(seed)
    except TypeError:
        raise RequestError(f"seed {seed!r} is not a whole number: give one from 0 to 2^64 - 1") from None
    if not 0 <= value < SEED_LIMIT:
        raise RequestError(f"seed {value} is out of range: give a whole number from 0 to 2^64 - 1")
    return value


def box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Turn raw generator words, a multiple of 16, into normals: each block holds eight radii, then eight angles."""
    uniforms = ((words & 0xFFFFFF) * np.float32(2**-24)).astype(np.float32).reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - uniforms[:, 0]))
    angle = np.float32(2 * np.pi) * uniforms[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
