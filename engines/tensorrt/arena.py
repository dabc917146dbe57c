"""Scratch memory that all engines of a backend share: engines of one stream run one after the other, so the largest
need is enough for all.

A captured graph keeps the address that its kernels were launched with. So a block never moves: when a later engine
needs more, a new block is made for it, and the old one lives on until the last binding that uses it is gone.
"""

from __future__ import annotations

import weakref
from contextlib import suppress

import numpy as np

from ..device import Device, Tensor
from ..errors import EngineError


class ArenaBlock:
    """A block of scratch memory; freed when the last binding lets go of it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        tensor = device.empty((nbytes,), np.uint8)
        self.pointer, self.nbytes = tensor.pointer, nbytes
        weakref.finalize(self, _drop, tensor).atexit = False  # the driver goes with the process


def _drop(tensor: Tensor) -> None:
    """Free a block that nobody holds any more; a driver that fails then has nobody to tell."""
    with suppress(EngineError):
        tensor.close()


class Arena:
    """Hands out one block, as large as the largest need announced before it was made."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._largest = 0
        self._current: weakref.ref[ArenaBlock] | None = None

    def reserve(self, nbytes: int) -> None:
        """Announce a need; bindings do so when they are made, long before the first of them runs."""
        self._largest = max(self._largest, nbytes)

    def block(self, nbytes: int) -> ArenaBlock:
        """Return a block of at least `nbytes`, shared with every binding that fits into it."""
        block = self._current() if self._current else None
        if block is None or block.nbytes < nbytes:
            block = ArenaBlock(self._device, max(self._largest, nbytes))
            self._current = weakref.ref(block)
        return block
