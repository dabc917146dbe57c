"""The host as a device: tensors are numpy arrays, streams run work at once, a captured graph is a list of calls."""

from __future__ import annotations

import math
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from .device import Array, Event, Stream, Tensor, check_copy, check_rows, check_shape
from .errors import EngineError, ShapeError


class HostTensor:
    """A numpy array at a fixed, 64-byte aligned address."""

    def __init__(self, device: HostDevice, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        memory = np.empty(self.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.array: Array = memory[start : start + self.nbytes].view(self.dtype).reshape(self.shape)
        self.pointer = memory[start:].ctypes.data
        self._device: HostDevice | None = device
        device._bytes += self.nbytes

    def write(self, array: Array, stream: Stream) -> None:
        """Copy an array of this shape and dtype into the tensor."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ShapeError(f"cannot write {array.dtype}{list(array.shape)} to {self.dtype}{list(self.shape)}")
        queue = _host(stream)
        values = array.copy() if queue.capturing else array  # a replay writes what was captured
        queue.submit(lambda: np.copyto(self.array, values))

    def read(self, stream: Stream) -> Array:
        """Return a copy of the contents."""
        stream.synchronize()
        return self.array.copy()

    def copy(self, source: Tensor, stream: Stream) -> None:
        """Copy another tensor of this shape and dtype."""
        check_copy(self, source)
        assert isinstance(source, HostTensor)
        _host(stream).submit(lambda: np.copyto(self.array, source.array))

    def rows(self, first: int, count: int) -> HostRows:
        """Return a part of the outermost axis, which owns no memory."""
        return HostRows(self, first, count)

    def shaped(self, shape: tuple[int, ...]) -> HostRows:
        """Return the same memory in another shape."""
        check_shape(self, shape)
        return HostRows(self, 0, self.shape[0], shape)

    def close(self) -> None:
        """Give the memory back; calling it again does nothing."""
        if self._device is not None:
            self._device._bytes -= self.nbytes
            self._device = None
            self.array = np.empty(0, self.dtype)


class HostRows(HostTensor):
    """A part of another tensor's outermost axis, in its shape or another."""

    def __init__(self, whole: HostTensor, first: int, count: int, shape: tuple[int, ...] | None = None) -> None:
        check_rows(whole, first, count)
        self.shape, self.dtype = shape or (count, *whole.shape[1:]), whole.dtype
        self.array = whole.array[first : first + count].reshape(self.shape)
        self.nbytes, self.pointer = self.array.nbytes, whole.pointer + first * (whole.nbytes // whole.shape[0])
        self._device = None


class HostEvent:
    """A time stamp: host work is done when it returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing: the work is done."""

    def milliseconds_since(self, earlier: Event) -> float:
        """Return the time between two events in milliseconds."""
        assert isinstance(earlier, HostEvent)
        return (self._time - earlier._time) * 1e3


class HostGraph:
    """A recorded list of calls."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls: list[Callable[[], object]] | None = calls

    def replay(self, stream: Stream) -> None:
        """Run the recorded calls in order."""
        if self._calls is None:
            raise EngineError("a closed graph was replayed: capture it again")
        queue = _host(stream)
        for call in self._calls:
            if queue.capturing:
                queue.submit(call)
            else:
                call()

    def close(self) -> None:
        """Drop the calls; calling it again does nothing."""
        self._calls = None


class HostCapture:
    """Calls recorded instead of run."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.open = True

    def finish(self) -> HostGraph:
        """Return the recorded calls as a graph."""
        if self.open:
            raise EngineError("a capture was finished inside its own block: leave the block first")
        return HostGraph(self.calls)


class HostStream:
    """Runs work at once, or records it while a capture is open."""

    handle = 0

    def __init__(self) -> None:
        self._capture: HostCapture | None = None

    @property
    def capturing(self) -> bool:
        """Whether work is being recorded instead of run."""
        return self._capture is not None

    def submit(self, call: Callable[[], object]) -> None:
        """Run `call` now, or record it when capturing."""
        if self._capture is None:
            call()
        else:
            self._capture.calls.append(call)

    def synchronize(self) -> None:
        """Do nothing, except refuse to wait inside a capture, as CUDA does."""
        if self._capture is not None:
            raise EngineError("a stream cannot be waited for while its work is being captured")

    def record(self) -> HostEvent:
        """Return an event at this moment."""
        return HostEvent()

    @contextmanager
    def capture(self) -> Iterator[HostCapture]:
        """Record what is submitted inside the block."""
        if self._capture is not None:
            raise EngineError("a stream that is already capturing cannot start another capture")
        self._capture = capture = HostCapture()
        try:
            yield capture
        finally:
            self._capture = None
            capture.open = False

    def close(self) -> None:
        """Do nothing: a host stream holds no resources."""


class HostDevice:
    """This machine's processor and memory."""

    name = "cpu"

    def __init__(self) -> None:
        self._bytes = 0
        self._statm: int | None = None
        with suppress(OSError):  # systems without /proc
            self._statm = os.open("/proc/self/statm", os.O_RDONLY)
            weakref.finalize(self, os.close, self._statm)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> HostTensor:
        """Allocate a tensor with undefined contents."""
        return HostTensor(self, shape, dtype)

    def stream(self) -> HostStream:
        """Create a stream."""
        return HostStream()

    def tensor_bytes(self) -> int:
        """Return the bytes that open tensors hold."""
        return self._bytes

    def memory_free(self) -> None:
        """Return None: the host's memory is shared with every other program, and may be swapped."""

    def bytes_taken(self) -> int:
        """Return the resident bytes of this process; where the system does not tell, the bytes of open tensors."""
        if self._statm is None:
            return self._bytes
        return int(os.pread(self._statm, 128, 0).split()[1]) * mmap.PAGESIZE


def _host(stream: Stream) -> HostStream:
    assert isinstance(stream, HostStream), "a host tensor was used with another device's stream"
    return stream
