"""CUDA graphs: work that a stream captures, and the executable graph it becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..device import Stream
from ..errors import EngineError

if TYPE_CHECKING:
    from .device import CudaDevice, CudaStream, Pinned


class CudaCapture:
    """Work being captured on one stream, and the pinned memory that its copies read."""

    def __init__(self, stream: CudaStream) -> None:
        self.stream = stream
        self.pinned: list[Pinned] = []
        self.handle: Any = None
        self.open = True

    def end(self) -> None:
        """Take the stream out of capture mode and keep what it captured; raises when something broke the capture."""
        self.stream.capturing, self.open = None, False
        try:
            self.handle = self.stream.device.activate().cuStreamEndCapture(self.stream.handle)
        except EngineError:
            self.abandon()
            raise

    def finish(self) -> CudaGraph:
        """Instantiate the captured work and upload it, so that the first replay costs what the others do."""
        if self.open:
            raise EngineError("a capture was finished inside its own block: leave the block first")
        if self.handle is None:
            raise EngineError("a capture was finished twice, or its block failed: capture again")
        handle, self.handle = self.handle, None
        device = self.stream.device
        driver = device.activate()
        try:
            executable = driver.cuGraphInstantiate(handle, 0)
        finally:
            driver.cuGraphDestroy(handle)
        driver.cuGraphUpload(executable, self.stream.handle)
        return CudaGraph(device, executable, self.pinned)

    def abandon(self) -> None:
        """Free what an unfinished capture holds."""
        if self.handle is not None:
            self.stream.device.activate().cuGraphDestroy(self.handle)
        self.handle = None
        for block in self.pinned:
            block.close()
        self.pinned = []


class CudaGraph:
    """An executable graph. What it reads and writes must stay alive until it is closed."""

    def __init__(self, device: CudaDevice, handle: Any, pinned: list[Pinned]) -> None:
        self._device = device
        self._handle = handle
        self._pinned = pinned

    def replay(self, stream: Stream) -> None:
        """Enqueue the captured work once more; returns at once."""
        if self._handle is None:
            raise EngineError("a closed graph was replayed: capture it again")
        self._device.activate().cuGraphLaunch(self._handle, stream.handle)

    def close(self) -> None:
        """Free the graph once its replays are done; calling it again does nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        driver = self._device.activate()
        driver.cuCtxSynchronize()
        driver.cuGraphExecDestroy(handle)
        for block in self._pinned:
            block.close()
        self._pinned = []
