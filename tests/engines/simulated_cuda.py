"""A CUDA driver without a GPU: enough of `cuda.bindings.driver` to run the device layer, and stricter than a GPU.

Device memory is host memory. Work waits in its stream until something synchronizes, so a copy out of memory that was
changed or freed too early shows. A call without a current context, a wait inside a capture and work on freed memory are
errors; `live` counts what has not been freed.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import Counter
from typing import Any

from .simulated_codes import Capture, CUdevice_attribute, CUresult, CUstreamCaptureMode, Failure, Mark, Op

CONTEXT = 7
"""The primary context of GPU 0; that of GPU 1 is the next number, and so on."""


class SimulatedDriver:
    """Stands in for the module `cuda.bindings.driver`; functions return (status, value) as there."""

    CUstreamCaptureMode = CUstreamCaptureMode
    CUdevice_attribute = CUdevice_attribute

    def __init__(self, total_bytes: int = 1 << 30, gpus: int = 1) -> None:
        self.total_bytes = total_bytes
        self.gpus = gpus
        self.homes: dict[int, int | None] = {}
        """The context that memory, a stream or an event was made in."""
        self.live: Counter[str] = Counter()
        self.launched: list[str] = []
        self.built_on: list[int] = []
        self._new = itertools.count(0x1000)
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._queues: dict[int, list[Op]] = {}
        self._captures: dict[int, Capture] = {}
        self._events: dict[int, Mark | None] = {}
        self._graphs: dict[int, list[Op]] = {}
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        """Return a driver function: the method `_name`, with its exceptions as status codes."""
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                value = getattr(self, f"_{name}")(*arguments)
            except Failure as failure:
                return (failure.code, None)
            values = () if value is None else value if isinstance(value, tuple) else (value,)
            return (CUresult.CUDA_SUCCESS, *values)

        return call

    # what a kernel launch is to the tests

    def launch(self, stream: int, op: Op, label: str = "kernel") -> None:
        """Enqueue `op` on a stream, or record it when the stream is captured."""

        def run() -> None:
            self.launched.append(label)
            op()

        self._submit(stream, run)

    def gpu(self) -> int:
        """Return the GPU that is current in the calling thread."""
        return self._context() - CONTEXT

    def check_memory(self, pointer: int) -> None:
        """Raise when an address is not in live device memory, or lies in it where TensorRT takes none."""
        inside = (at for at, memory in self._memory.items() if 0 <= pointer - at < max(1, len(memory)))
        if not any((pointer - at) % 256 == 0 for at in inside):
            raise Failure(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    # devices and contexts

    def _cuInit(self, flags: int) -> None: ...
    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuDeviceGetCount(self) -> int:
        return self.gpus

    def _cuDeviceGet(self, number: int) -> int:
        return number

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Simulated GPU\0\0"

    def _cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: int) -> int:
        return 8 if attribute.name.endswith("MAJOR") else 9

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.live["context"] += 1
        return CONTEXT + device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.live["context"] -= 1

    def _cuCtxSetCurrent(self, context: int) -> None:
        self._thread.current = context

    def _cuCtxSynchronize(self) -> None:
        self._refuse_while_capturing()
        for stream in list(self._queues):
            if self.homes[stream] == self._context():
                self._drain(stream)

    def _cuGetErrorString(self, status: CUresult) -> bytes:
        return status.name.lower().replace("_", " ").encode()

    # memory

    def _cuMemAlloc(self, nbytes: int) -> int:
        if nbytes > self._cuMemGetInfo()[0]:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return self._allocate(self._memory, nbytes, "memory")

    def _cuMemFree(self, pointer: int) -> None:
        self._refuse_while_capturing()
        self._free(self._memory, pointer, "memory")

    def _cuMemHostAlloc(self, nbytes: int, flags: int) -> int:
        return self._allocate(self._pinned, nbytes, "pinned")

    def _cuMemFreeHost(self, pointer: int) -> None:
        self._refuse_while_capturing()
        self._free(self._pinned, pointer, "pinned")

    def _cuMemGetInfo(self) -> tuple[int, int]:
        here = self._context()
        taken = sum(len(memory) for pointer, memory in self._memory.items() if self.homes[pointer] == here)
        return self.total_bytes - taken, self.total_bytes

    def _cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._at_home(stream, target)
        self._submit(stream, lambda: self._copy(target, source, nbytes, self._memory, self._pinned))

    def _cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._at_home(stream, source)
        self._submit(stream, lambda: self._copy(target, source, nbytes, self._pinned, self._memory))

    def _cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._at_home(stream, target)
        self._submit(stream, lambda: self._copy(target, source, nbytes, self._memory, self._memory))

    # streams and events

    def _cuStreamCreate(self, flags: int) -> int:
        self.live["stream"] += 1
        handle = next(self._new)
        self.homes[handle] = self._context()
        self._queues[handle] = []
        return handle

    def _cuStreamDestroy(self, stream: int) -> None:
        self._drain(stream)
        del self._queues[stream]
        self.live["stream"] -= 1

    def _cuStreamSynchronize(self, stream: int) -> None:
        if stream in self._captures:
            self._fail(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        self._drain(stream)

    def _cuEventCreate(self, flags: int) -> int:
        self.live["event"] += 1
        handle = next(self._new)
        self.homes[handle] = self._context()
        self._events[handle] = None
        return handle

    def _cuEventDestroy(self, event: int) -> None:
        del self._events[event]
        self.live["event"] -= 1

    def _cuEventRecord(self, event: int, stream: int) -> None:
        if stream in self._captures:  # legal, but an event that nobody could wait for
            self._fail(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        self._at_home(stream, event)
        mark = self._events[event] = Mark(stream)
        self._submit(stream, lambda: setattr(mark, "time", time.perf_counter()))

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        mark = self._events[event]
        assert mark is not None
        self._submit(stream, lambda: self._reach(mark))

    def _cuEventSynchronize(self, event: int) -> None:
        mark = self._events[event]
        if mark is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        self._reach(mark)

    def _cuEventElapsedTime(self, start: int, end: int) -> float:
        times = [mark.time if (mark := self._events[event]) else None for event in (start, end)]
        if times[0] is None or times[1] is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return (times[1] - times[0]) * 1e3

    # graphs

    def _cuStreamBeginCapture(self, stream: int, mode: CUstreamCaptureMode) -> None:
        assert isinstance(mode, CUstreamCaptureMode)
        self._captures[stream] = Capture()

    def _cuStreamEndCapture(self, stream: int) -> int:
        capture = self._captures.pop(stream)
        if not capture.valid:
            raise Failure(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self._graph(capture.ops, "graph")

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._graph(self._graphs[graph], "executable")

    def _cuGraphUpload(self, graph: int, stream: int) -> None: ...
    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        self._context()
        for op in self._graphs[graph]:
            self._submit(stream, op)

    def _cuGraphDestroy(self, graph: int) -> None:
        del self._graphs[graph]
        self.live["graph"] -= 1

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self._graphs[graph]
        self.live["executable"] -= 1

    # inside

    def _context(self) -> int:
        if (current := getattr(self._thread, "current", None)) is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return int(current)

    def _at_home(self, stream: int, other: int) -> None:
        """A stream takes what was made on its own GPU, while that GPU is current."""
        if {self.homes.get(stream), self.homes.get(other, self.homes.get(stream))} != {self._context()}:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)

    def _refuse_while_capturing(self) -> None:
        """What waits for a whole GPU breaks every capture on it."""
        here = self._context()
        if any(self.homes[stream] == here for stream in self._captures):
            self._fail(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def _fail(self, code: CUresult) -> None:
        for capture in self._captures.values():
            capture.valid = False
        raise Failure(code)

    def _submit(self, stream: int, op: Op) -> None:
        self._at_home(stream, stream)
        if stream not in self._queues:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        capture = self._captures.get(stream)
        if capture is None:
            self._queues[stream].append(op)
        else:
            capture.ops.append(op)

    def _drain(self, stream: int) -> None:
        queue = self._queues[stream]
        while queue:
            queue.pop(0)()

    def _reach(self, mark: Mark) -> None:
        while mark.time is None:
            self._queues[mark.stream].pop(0)()

    def _graph(self, ops: list[Op], kind: str) -> int:
        self.live[kind] += 1
        handle = next(self._new)
        self._graphs[handle] = list(ops)
        return handle

    def _allocate(self, table: dict[int, Any], nbytes: int, kind: str) -> int:
        memory = (ctypes.c_uint8 * (nbytes + 256))()
        ctypes.memset(memory, 0xAB, nbytes + 256)
        pointer = -(-ctypes.addressof(memory) // 256) * 256
        table[pointer] = memory
        self.homes[pointer] = getattr(self._thread, "current", None)
        self.live[kind] += 1
        return pointer

    def _free(self, table: dict[int, Any], pointer: int, kind: str) -> None:
        if pointer not in table:
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        memory = table.pop(pointer)
        ctypes.memset(memory, 0xDD, len(memory))
        self.live[kind] -= 1

    def _copy(self, target: int, source: int, nbytes: int, to: dict[int, Any], of: dict[int, Any]) -> None:
        for table, pointer in ((to, target), (of, source)):
            if not any(first <= pointer and pointer + nbytes <= first + len(memory) for first, memory in table.items()):
                raise Failure(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        ctypes.memmove(target, source, nbytes)
