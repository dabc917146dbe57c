"""What a device is to the rest of latentrt: memory, streams, events and captured graphs.

Two implementations: `host` (numpy, work runs at once) and `cuda` (`cuda.bindings`). The denoising loop is written
against them once, so the loop that the CPU tests run is the loop that a GPU runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ShapeError

Array = npt.NDArray[Any]


class Tensor(Protocol):
    """Memory on a device with a shape and an element type; its address never changes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""

    @property
    def pointer(self) -> int:
        """Address of the first element, on the device."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def write(self, array: Array, stream: Stream) -> None:
        """Copy a host array of this shape and dtype to the device, in stream order; the array may change afterwards."""

    def read(self, stream: Stream) -> Array:
        """Wait for the stream and return a copy on the host."""

    def copy(self, source: Tensor, stream: Stream) -> None:
        """Copy another tensor of this device, of the same shape and dtype, in stream order."""

    def rows(self, first: int, count: int) -> Tensor:
        """Return a part of the outermost axis as a tensor that owns no memory: use it while this one is open."""

    def shaped(self, shape: tuple[int, ...]) -> Tensor:
        """Return the same memory in another shape, as `rows` does."""

    def close(self) -> None:
        """Free the memory; calling it again does nothing."""


def check_rows(tensor: Tensor, first: int, count: int) -> None:
    """Raise `ShapeError` unless a tensor has `count` rows from `first` on."""
    if not tensor.shape or first < 0 or count < 1 or first + count > tensor.shape[0]:
        raise ShapeError(f"rows {first} to {first + count} of a tensor {list(tensor.shape)} were asked for")


def check_shape(tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise `ShapeError` unless a shape has as many numbers as a tensor."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise ShapeError(f"a tensor {list(tensor.shape)} was asked for in the shape {list(shape)}")


def check_copy(target: Tensor, source: Tensor) -> None:
    """Raise `ShapeError` unless one tensor can be copied to another."""
    if source.shape != target.shape or source.dtype != target.dtype:
        one, other = (f"{tensor.dtype}{list(tensor.shape)}" for tensor in (source, target))
        raise ShapeError(f"cannot copy {one} to {other}")


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the work before this point is done."""

    def milliseconds_since(self, earlier: Event) -> float:
        """Return the time between two points of one device, in milliseconds."""


class Graph(Protocol):
    """Captured work, ready to be replayed any number of times."""

    def replay(self, stream: Stream) -> None:
        """Enqueue the captured work once more; returns at once."""

    def close(self) -> None:
        """Free the graph; calling it again does nothing."""


class Capture(Protocol):
    """Work being captured; `finish` after the block turns it into a `Graph`."""

    def finish(self) -> Graph:
        """Return the captured graph; an error inside the block has already been raised."""


class Stream(Protocol):
    """An ordered queue of work on a device."""

    @property
    def handle(self) -> int:
        """The native stream handle (0 on the host)."""

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""

    def record(self) -> Event:
        """Return an event behind the work enqueued so far."""

    def capture(self) -> AbstractContextManager[Capture]:
        """Capture what is enqueued inside the block instead of running it."""

    def close(self) -> None:
        """Free the stream; calling it again does nothing."""


class Device(Protocol):
    """Something that owns memory and runs engines."""

    @property
    def name(self) -> str:
        """What the device is called in reports."""

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
        """Allocate a tensor with undefined contents."""

    def stream(self) -> Stream:
        """Create a stream."""

    def tensor_bytes(self) -> int:
        """Return the bytes that tensors of this device hold now."""

    def memory_free(self) -> tuple[int, int] | None:
        """Return the free and the total bytes of memory that is the device's own; None where it is the host's."""

    def bytes_taken(self) -> int:
        """Return the bytes of the device's memory that went to this process: tensors, weights, contexts, arenas.

        The host counts resident pages. A GPU counts how much less is free than when it was opened, so what other
        programs take meanwhile is in it. Never waits for enqueued work.
        """
