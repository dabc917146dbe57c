"""An NVIDIA GPU as a device: memory, streams and events over `cuda.bindings`.

Host arrays cross through pinned memory: each tensor has one block of it, made at its first copy, so a copy is
asynchronous and the array may change at once. A write inside a capture gets a block of its own that lives as long as
the graph: a replay writes the values that were captured. Nothing but `read`, `synchronize` and `close` waits.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..device import Array, Event, Stream
from ..errors import EngineError, ShapeError
from .driver import Driver, load_driver
from .graph import CudaCapture


class CudaDevice:
    """One GPU, used through its primary context, which TensorRT and ONNX Runtime share."""

    def __init__(self, number: int = 0, driver: Driver | None = None) -> None:
        """Open GPU `number`; raises `BackendUnavailableError` without a driver, `EngineError` without that GPU."""
        self._driver = driver or load_driver()
        count = self._driver.cuDeviceGetCount()
        if not 0 <= number < count:
            raise EngineError(f"there is no GPU {number}: this process sees {count}, numbered from 0")
        self.number = number
        self._gpu = self._driver.cuDeviceGet(number)
        self._context: Any = self._driver.cuDevicePrimaryCtxRetain(self._gpu)
        self._threads = threading.local()
        self._events: list[Any] = []
        self._bytes = 0
        self._free_at_open = self.memory_free()[0]
        self.name = self._driver.cuDeviceGetName(128, self._gpu).split(b"\0")[0].decode()

    def activate(self) -> Driver:
        """Make this GPU current in the calling thread and return the driver."""
        if self._context is None:
            raise EngineError("a closed GPU was used: open it again")
        if not getattr(self._threads, "active", False):
            self._driver.cuCtxSetCurrent(self._context)
            self._threads.active = True
        return self._driver

    @property
    def compute_capability(self) -> str:
        """The GPU's architecture, such as `8.9`."""
        kind = self._driver.CUdevice_attribute
        names = ("MAJOR", "MINOR")
        parts = [getattr(kind, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}") for name in names]
        return ".".join(str(self._driver.cuDeviceGetAttribute(part, self._gpu)) for part in parts)

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver supports, such as `13.0`."""
        version = self._driver.cuDriverGetVersion()
        return f"{version // 1000}.{version % 1000 // 10}"

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> CudaTensor:
        """Allocate a tensor with undefined contents."""
        return CudaTensor(self, shape, dtype)

    def stream(self) -> CudaStream:
        """Create a stream that does not wait for the default stream."""
        return CudaStream(self)

    def tensor_bytes(self) -> int:
        """Return the bytes that open tensors hold; weights and contexts of engines are not counted."""
        return self._bytes

    def bytes_taken(self) -> int:
        """Return how many bytes less are free on the GPU than when it was opened, all programs counted."""
        return self._free_at_open - self.memory_free()[0]

    def memory_free(self) -> tuple[int, int]:
        """Return the GPU's free and total bytes, all programs counted."""
        free, total = self.activate().cuMemGetInfo()
        return int(free), int(total)

    def close(self) -> None:
        """Give the context back once all work is done; calling it again does nothing."""
        if self._context is None:
            return
        driver = self.activate()
        driver.cuCtxSynchronize()
        for handle in self._events:
            driver.cuEventDestroy(handle)
        self._events, self._context = [], None
        driver.cuDevicePrimaryCtxRelease(self._gpu)


class Pinned:
    """Page-locked host memory that a copy engine can read and write, and the point at which it is free again."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self._device = device
        self.pointer = int(device.activate().cuMemHostAlloc(nbytes, 0))
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.pointer))
        self.busy_until: CudaEvent | None = None

    def fill(self, array: Array) -> None:
        """Overwrite the block with an array, after the copy out of it that is still on its way."""
        if self.busy_until is not None:
            self.busy_until.synchronize()
        np.copyto(self.bytes.view(array.dtype).reshape(array.shape), array)

    def close(self) -> None:
        """Free the memory; the work that uses it must be done. Calling it again does nothing."""
        if self.pointer:
            self.bytes, self.busy_until = np.empty(0, np.uint8), None
            self._device.activate().cuMemFreeHost(self.pointer)
            self.pointer = 0


class CudaTensor:
    """Memory on the GPU at a fixed address, aligned to 256 bytes or better."""

    def __init__(self, device: CudaDevice, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._device = device
        self._pinned: Pinned | None = None
        self.pointer = int(device.activate().cuMemAlloc(max(1, self.nbytes)))
        device._bytes += self.nbytes

    def write(self, array: Array, stream: Stream) -> None:
        """Copy an array of this shape and dtype to the GPU, in stream order; the array may change afterwards."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ShapeError(f"cannot write {array.dtype}{list(array.shape)} to {self.dtype}{list(self.shape)}")
        driver, queue = self._open(), cuda_stream(stream)
        if not self.nbytes:
            return
        if queue.capturing is not None:
            block = Pinned(self._device, self.nbytes)
            queue.capturing.pinned.append(block)
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

    def close(self) -> None:
        """Free the memory once all work on the GPU is done; calling it again does nothing."""
        if not self.pointer:
            return
        pointer, self.pointer = self.pointer, 0
        driver = self._device.activate()
        driver.cuCtxSynchronize()
        driver.cuMemFree(pointer)
        if self._pinned is not None:
            self._pinned.close()
        self._device._bytes -= self.nbytes

    def _open(self) -> Driver:
        if not self.pointer:
            raise EngineError("a closed tensor was used")
        return self._device.activate()

    def _block(self) -> Pinned:
        if self._pinned is None:
            self._pinned = Pinned(self._device, self.nbytes)
        return self._pinned


class CudaEvent:
    """A point in a stream's work; its native event goes back to the device's pool when this object dies."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        driver = device.activate()
        self.handle: Any = device._events.pop() if device._events else driver.cuEventCreate(0)

    def synchronize(self) -> None:
        """Wait until the work before this point is done."""
        self._device.activate().cuEventSynchronize(self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Wait for both points and return the GPU's time between them, in milliseconds."""
        assert isinstance(earlier, CudaEvent)
        earlier.synchronize()
        self.synchronize()
        return float(self._device.activate().cuEventElapsedTime(earlier.handle, self.handle))

    def __del__(self) -> None:
        if handle := getattr(self, "handle", None):
            self._device._events.append(handle)


class CudaStream:
    """An ordered queue of work on one GPU."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        driver = device.activate()
        self._native: Any = driver.cuStreamCreate(1)  # 1: does not wait for the default stream
        self.handle = int(self._native)
        self.capturing: CudaCapture | None = None

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        self.check_not_capturing()
        self._open().cuStreamSynchronize(self.handle)

    def record(self) -> CudaEvent:
        """Return an event behind the work enqueued so far."""
        self.check_not_capturing()
        driver = self._open()
        event = CudaEvent(self.device)
        driver.cuEventRecord(event.handle, self.handle)
        return event

    def follow(self, other: CudaStream) -> None:
        """Let the work enqueued from here on run after what `other` holds now; joins a capture that `other` is in."""
        driver = self._open()
        event = CudaEvent(self.device)
        driver.cuEventRecord(event.handle, other.handle)
        driver.cuStreamWaitEvent(self.handle, event.handle, 0)

    def check_not_capturing(self) -> None:
        """Raise `EngineError` inside a capture, where nothing can be waited for."""
        if self.capturing is not None:
            raise EngineError("a stream cannot be waited for while its work is being captured")

    @contextmanager
    def capture(self) -> Iterator[CudaCapture]:
        """Capture what is enqueued inside the block.

        The mode is relaxed: engines may allocate while they enqueue, and other threads are not disturbed.
        """
        if self.capturing is not None:
            raise EngineError("a stream that is already capturing cannot start another capture")
        driver = self._open()
        driver.cuStreamBeginCapture(self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        self.capturing = capture = CudaCapture(self)
        try:
            yield capture
        except BaseException:
            with suppress(EngineError):  # what went wrong in the block says more than that the capture is broken
                capture.end()
            capture.abandon()
            raise
        capture.end()

    def close(self) -> None:
        """Free the stream once its work is done; calling it again does nothing."""
        if self._native is None:
            return
        self.synchronize()
        self._native = None
        self.device.activate().cuStreamDestroy(self.handle)

    def _open(self) -> Driver:
        if self._native is None:
            raise EngineError("a closed stream was used")
        return self.device.activate()


def cuda_stream(stream: Stream) -> CudaStream:
    """Return the stream as a CUDA stream; a stream of another device is a mistake of the caller."""
    assert isinstance(stream, CudaStream), "a GPU tensor was used with another device's stream"
    return stream
