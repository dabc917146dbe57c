"""CUDA graphs: work that a stream captures, and the executable graph it becomes."""

from __future__ import annotations

from typing import Any, Protocol

from ..device import Stream
from ..errors import EngineError
from .context import CudaContext


class Closable(Protocol):
    """Something that a graph reads and that is freed with it."""

    def close(self) -> None:
        """Free it; calling it again does nothing."""


class CudaCapture:
    """Work being captured on one stream, and the memory of its own that the work reads."""

    def __init__(self, context: CudaContext, stream: int) -> None:
        """`stream` is the native handle of a stream in capture mode."""
        self.held: list[Closable] = []
        self._context = context
        self._stream = stream
        self._handle: Any = None
        self._open = True

    def end(self) -> None:
        """Take the stream out of capture mode and keep what it captured; raises when something broke the capture."""
        self._open = False
        try:
            self._handle = self._context.activate().cuStreamEndCapture(self._stream)
        except EngineError:
            self.abandon()
            raise

    def finish(self) -> CudaGraph:
        """Instantiate the captured work and upload it, so that the first replay costs what the others do."""
        if self._open:
            raise EngineError("a capture was finished inside its own block: leave the block first")
        if self._handle is None:
            raise EngineError("a capture was finished twice, or its block failed: capture again")
        handle, self._handle = self._handle, None
        driver = self._context.activate()
        try:
            executable = driver.cuGraphInstantiate(handle, 0)
        finally:
            driver.cuGraphDestroy(handle)
        driver.cuGraphUpload(executable, self._stream)
        return CudaGraph(self._context, executable, self.held)

    def abandon(self) -> None:
        """Free what an unfinished capture holds."""
        if self._handle is not None:
            self._context.activate().cuGraphDestroy(self._handle)
        self._handle = None
        for thing in self.held:
            thing.close()
        self.held = []


class CudaGraph:
    """An executable graph. What it reads and writes must stay alive until it is closed."""

    def __init__(self, context: CudaContext, handle: Any, held: list[Closable]) -> None:
        """`held` is closed with the graph."""
        self._context = context
        self._handle = handle
        self._held = held

    def replay(self, stream: Stream) -> None:
        """Enqueue the captured work once more; returns at once."""
        if self._handle is None:
            raise EngineError("a closed graph was replayed: capture it again")
        self._context.activate().cuGraphLaunch(self._handle, stream.handle)

    def close(self) -> None:
        """Free the graph once its replays are done; calling it again does nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        driver = self._context.activate()
        driver.cuCtxSynchronize()
        driver.cuGraphExecDestroy(handle)
        for thing in self._held:
            thing.close()
        self._held = []
