"""A GPU's primary context: made current before every call, with what all memory and streams of the GPU share."""

from __future__ import annotations

import threading
from typing import Any

from ..errors import EngineError
from .driver import Driver, load_driver


class CudaContext:
    """One GPU's primary context, which TensorRT and ONNX Runtime share; it counts memory and keeps events for reuse."""

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

    def activate(self) -> Driver:
        """Make this GPU current in the calling thread and return the driver."""
        if self._context is None:
            raise EngineError("a closed GPU was used: open it again")
        if not getattr(self._threads, "active", False):
            self._driver.cuCtxSetCurrent(self._context)
            self._threads.active = True
        return self._driver

    def take_event(self) -> Any:
        """Return a native event: one that was given back, else a new one."""
        driver = self.activate()
        return self._events.pop() if self._events else driver.cuEventCreate(0)

    def give_back_event(self, handle: Any) -> None:
        """Keep a native event that nobody refers to any more for the next `take_event`."""
        self._events.append(handle)

    def count(self, nbytes: int) -> None:
        """Add to the bytes that open tensors hold; negative when they are freed."""
        self._bytes += nbytes

    def tensor_bytes(self) -> int:
        """Return the bytes that open tensors hold; weights and contexts of engines are not counted."""
        return self._bytes

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
