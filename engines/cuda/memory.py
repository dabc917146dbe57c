"""Memory of a GPU, and the pinned host memory through which arrays reach it.

Each tensor has one pinned block, made at its first copy, so a copy is asynchronous and the array may change at once. A
write inside a capture gets a block of its own that lives as long as the graph: a replay writes the values that were
captured.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from ..device import Array, Stream, Tensor, check_copy, check_rows, check_shape
from ..errors import EngineError, ShapeError
from .context import CudaContext
from .driver import Driver
from .stream import CudaEvent, cuda_stream


class Pinned:
    """Page-locked host memory that a copy engine can read and write, and the point at which it is free again."""

    def __init__(self, context: CudaContext, nbytes: int) -> None:
        self._context = context
        self.pointer = int(context.activate().cuMemHostAlloc(nbytes, 0))
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.pointer))
        self.busy_until: CudaEvent | None = None

    def fill(self, array: Array) -> None:
        """Overwrite the block with an array, after the copy out of it that is still on its way."""
        if self.busy_until is not None:
            self.busy_until.synchronize()
        np.copyto(self.bytes.view(array.dtype).reshape(array.shape), array)

    def close(self) -> None:
        """Free the memory once the work that uses it is done; calling it again does nothing."""
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self.bytes, self.busy_until = np.empty(0, np.uint8), None
            self._context.release(lambda driver: driver.cuMemFreeHost(pointer))


class CudaTensor:
    """Memory on the GPU at a fixed address, aligned to 256 bytes or better."""

    def __init__(self, context: CudaContext, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._context = context
        self._pinned: Pinned | None = None
        self.pointer = int(context.activate().cuMemAlloc(max(1, self.nbytes)))
        context.count(self.nbytes)

    def write(self, array: Array, stream: Stream) -> None:
        """Copy an array of this shape and dtype to the GPU, in stream order; the array may change afterwards.

        Waits for the copy of this tensor that is still on its way, if there is one.
        """
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ShapeError(f"cannot write {array.dtype}{list(array.shape)} to {self.dtype}{list(self.shape)}")
        driver, queue = self._open(), cuda_stream(stream)
        if not self.nbytes:
            return
        if queue.capturing is not None:
            block = Pinned(self._context, self.nbytes)
            queue.capturing.held.append(block)
        else:
            block = self._block()
        block.fill(array)
        driver.cuMemcpyHtoDAsync(self.pointer, block.pointer, self.nbytes, queue.handle)
        if queue.capturing is None:
            block.busy_until = queue.record()

    def read(self, stream: Stream) -> Array:
        """Wait for the stream and return a copy on the host."""
        driver, queue = self._open(), cuda_stream(stream)
        queue.check_not_capturing()
        if not self.nbytes:
            queue.synchronize()
            return np.empty(self.shape, self.dtype)
        block = self._block()
        if block.busy_until is not None:
            block.busy_until.synchronize()
        driver.cuMemcpyDtoHAsync(block.pointer, self.pointer, self.nbytes, queue.handle)
        queue.synchronize()
        return np.array(block.bytes.view(self.dtype).reshape(self.shape))

    def copy(self, source: Tensor, stream: Stream) -> None:
        """Copy another tensor of this shape and dtype on the GPU, in stream order."""
        check_copy(self, source)
        driver, queue = self._open(), cuda_stream(stream)
        if self.nbytes:
            driver.cuMemcpyDtoDAsync(self.pointer, source.pointer, self.nbytes, queue.handle)

    def rows(self, first: int, count: int) -> CudaRows:
        """Return a part of the outermost axis, which owns no memory of the GPU."""
        return CudaRows(self, first, count)

    def shaped(self, shape: tuple[int, ...]) -> CudaRows:
        """Return the same memory in another shape."""
        check_shape(self, shape)
        return CudaRows(self, 0, self.shape[0], shape)

    def close(self) -> None:
        """Free the memory once the work that uses it is done; calling it again does nothing."""
        if not self.pointer:
            return
        pointer, self.pointer = self.pointer, 0
        pinned, self._pinned = self._pinned, None
        self._context.count(-self.nbytes)
        with ExitStack() as undo:
            if pinned is not None:
                undo.callback(pinned.close)
            self._context.release(lambda driver: driver.cuMemFree(pointer))

    def _open(self) -> Driver:
        if not self.pointer:
            raise EngineError("a closed tensor was used")
        return self._context.activate()

    def _block(self) -> Pinned:
        if self._pinned is None:
            self._pinned = Pinned(self._context, self.nbytes)
        return self._pinned


class CudaRows(CudaTensor):
    """A part of another tensor's outermost axis, in its shape or another, with a pinned block of its own."""

    def __init__(self, whole: CudaTensor, first: int, count: int, shape: tuple[int, ...] | None = None) -> None:
        check_rows(whole, first, count)
        each = whole.nbytes // whole.shape[0]
        self.shape, self.dtype, self.nbytes = shape or (count, *whole.shape[1:]), whole.dtype, count * each
        self.pointer = whole.pointer + first * each
        self._whole, self._context, self._pinned = whole, whole._context, None

    def close(self) -> None:
        """Free the pinned block; calling it again does nothing."""
        self.pointer = 0
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.close()

    def _open(self) -> Driver:
        self._whole._open()
        return super()._open()
