"""CUDA graphs: work that a stream captures, and the executable graph it becomes."""

from __future__ import annotations

from contextlib import ExitStack
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
        with ExitStack() as undo:
            undo.callback(self.abandon)
            driver = self._context.activate()
            executable = driver.cuGraphInstantiate(self._handle, 0)
            undo.callback(driver.cuGraphExecDestroy, executable)
            driver.cuGraphUpload(executable, self._stream)
            undo.pop_all()
        handle, self._handle = self._handle, None
        graph, self.held = CudaGraph(self._context, executable, self.held), []
        driver.cuGraphDestroy(handle)
        return graph

    def abandon(self) -> None:
        """Free what an unfinished capture holds; nothing of it has run."""
        (handle, self._handle), (held, self.held) = (self._handle, None), (self.held, [])
        with ExitStack() as undo:
            for thing in held:
                undo.callback(thing.close)
            if handle is not None:
                self._context.activate().cuGraphDestroy(handle)


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
        (handle, self._handle), (held, self._held) = (self._handle, None), (self._held, [])
        with ExitStack() as undo:
            for thing in held:
                undo.callback(thing.close)
            self._context.release(lambda driver: driver.cuGraphExecDestroy(handle))
