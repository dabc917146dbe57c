"""A GPU's primary context: made current before every call, with what all memory and streams of the GPU share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import EngineError
from .driver import Driver, load_driver
from .release import Free, releases_of


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
        self._open = True
        self.releases = releases_of(self._driver, number)
        self._streams: set[int] = set()
        self._events: list[Any] = []
        self._bytes = 0

    def activate(self) -> Driver:
        """Make this GPU current in the calling thread and return the driver.

        Called before everything that a context matters to: any library, and any other GPU's work in the same thread,
        may have made another context current since the last time.
        """
        if not self._open:
            raise EngineError("a closed GPU was used: open it again")
        return self.enter()

    def enter(self) -> Driver:
        """Make this GPU current and return the driver, also while what it held is freed after its end."""
        self._driver.cuCtxSetCurrent(self._context)
        return self._driver

    def release(self, free: Free) -> None:
        """Call `free` with the driver once the work enqueued by now is done; see `Releases.add`."""
        self.activate()
        self.releases.add(self, free)

    def mark(self) -> Callable[[], None]:
        """Record an event behind the work of each stream, and return what waits for these events and keeps them."""
        driver = self.enter()
        events: list[Any] = []
        try:
            for stream in tuple(self._streams):
                events.append(self._event(driver))
                driver.cuEventRecord(events[-1], stream)
        except BaseException:
            self._events += events
            raise

        def wait() -> None:
            try:
                for event in events:
                    self.enter().cuEventSynchronize(event)
            finally:
                self._events.extend(events)

        return wait

    def add_stream(self, handle: int) -> None:
        """Count a stream among those whose work may use this device's memory."""
        self._streams.add(handle)

    def drop_stream(self, handle: int) -> None:
        """Destroy a stream whose work is done."""
        driver = self.activate()
        with self.releases.lock:
            self._streams.discard(handle)
            driver.cuStreamDestroy(handle)

    def take_event(self) -> Any:
        """Return a native event: one that was given back, else a new one."""
        return self._event(self.activate())

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
        """Give the context back once its streams' work is done; calling it again does nothing."""
        if self._open:
            self._open = False
            self.releases.add(self, self._give_back)

    def _event(self, driver: Driver) -> Any:
        try:
            return self._events.pop()
        except IndexError:
            return driver.cuEventCreate(0)

    def _give_back(self, driver: Driver) -> None:
        events, self._events = self._events, []
        for handle in events:
            driver.cuEventDestroy(handle)
        driver.cuDevicePrimaryCtxRelease(self._gpu)
