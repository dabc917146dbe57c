"""Streams of a GPU, and the events that mark points in their work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..device import Event, Stream
from ..errors import EngineError
from .context import CudaContext
from .driver import Driver
from .graph import CudaCapture


class CudaEvent:
    """A point in a stream's work; its native event goes back to the context when this object dies."""

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self.handle: Any = context.take_event()

    def synchronize(self) -> None:
        """Wait until the work before this point is done."""
        self._context.activate().cuEventSynchronize(self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Wait for both points and return the GPU's time between them, in milliseconds."""
        assert isinstance(earlier, CudaEvent)
        earlier.synchronize()
        self.synchronize()
        return float(self._context.activate().cuEventElapsedTime(earlier.handle, self.handle))

    def __del__(self) -> None:
        if handle := getattr(self, "handle", None):
            self._context.give_back_event(handle)


class CudaStream:
    """An ordered queue of work on one GPU."""

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self._native: Any = context.activate().cuStreamCreate(1)  # 1: does not wait for the default stream
        self.handle = int(self._native)
        context.add_stream(self.handle)
        self.capturing: CudaCapture | None = None

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        self.check_not_capturing()
        self._open().cuStreamSynchronize(self.handle)

    def record(self) -> CudaEvent:
        """Return an event behind the work enqueued so far."""
        self.check_not_capturing()
        driver = self._open()
        event = CudaEvent(self._context)
        driver.cuEventRecord(event.handle, self.handle)
        return event

    def follow(self, other: CudaStream) -> None:
        """Let the work enqueued from here on run after what `other` holds now."""
        self.check_not_capturing()
        self._open().cuStreamWaitEvent(self.handle, other.record().handle, 0)

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
        with self._context.releases.paused():
            driver.cuStreamBeginCapture(self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
            self.capturing = capture = CudaCapture(self._context, self.handle)
            try:
                yield capture
            except BaseException:
                self.capturing = None
                with suppress(EngineError):  # what went wrong in the block says more than that the capture is broken
                    capture.end()
                capture.abandon()
                raise
            self.capturing = None
            capture.end()

    def close(self) -> None:
        """Free the stream once its work is done; calling it again does nothing."""
        if self._native is None:
            return
        self.synchronize()
        self._native = None
        self._context.drop_stream(self.handle)

    def _open(self) -> Driver:
        if self._native is None:
            raise EngineError("a closed stream was used")
        return self._context.activate()


def cuda_stream(stream: Stream) -> CudaStream:
    """Return the stream as a CUDA stream; a stream of another device is a mistake of the caller."""
    assert isinstance(stream, CudaStream), "a GPU tensor was used with another device's stream"
    return stream
