"""What all requests to a bundle share on a backend: engines, workspaces, a stream, and whose turn it is."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...engines.backends import Backend
from ...engines.bundle import Bundle, GraphInfo, Stage
from ...engines.device import Array
from ...engines.engine import Engine, Shapes
from ...engines.errors import EngineError, RequestError
from ...engines.progress import Progress, silent
from .workspace import Workspace, run_once

MAX_WORKSPACES = 4
"""Request shapes whose buffers and captured graphs are kept; the least recently used goes first."""


class Session:
    """A bundle open on a backend. One request runs at a time, on all sessions of a backend: others wait their turn."""

    def __init__(
        self, bundle: Bundle, backend: Backend, *, low_memory: bool = False, progress: Progress = silent
    ) -> None:
        """Open the engines that every request needs; with `low_memory` each stage opens its own and closes them."""
        self.bundle = bundle
        self.backend = backend
        self.low_memory = low_memory
        self.stream = backend.device.stream()
        self._workspaces: OrderedDict[Any, Workspace] = OrderedDict()
        self._engines: dict[tuple[str, Any], Engine] = {}
        self._busy = self._closed = False
        self._process = os.getpid()
        _SESSIONS.add(self)
        graphs = [graph for graph in bundle.manifest.graphs if graph.stage != "image"]  # most start from noise
        try:
            for number, graph in enumerate(graphs if backend.dynamic and not low_memory else []):
                progress(f"opening {graph.name}", number, len(graphs))
                self.engine(graph, {})
        except BaseException:
            self.close()
            raise

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold the backend inside the block; raises `RequestError` inside another request of the same thread."""
        with self.turn():
            if self._busy:
                raise RequestError(
                    "a callback asked its own pipeline for another picture: show previews with decode, "
                    "or open a second pipeline for it"
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the backend inside the block, also inside a request of the same thread."""
        if os.getpid() != self._process:
            raise EngineError(
                f"the pipeline was opened in process {self._process}, and this is {os.getpid()}, a fork of it: "
                "open a pipeline in each worker process"
            )
        with self.backend.lock:
            if self._closed:
                raise EngineError("the pipeline is closed: open it again")
            yield

    @property
    def open_graphs(self) -> set[str]:
        """The graphs whose engines are open."""
        return {name for name, _ in self._engines}

    def engine(self, graph: GraphInfo, shapes: Shapes) -> Engine:
        """Return a graph's engine for input shapes, opened when it is not."""
        fixed = () if self.backend.dynamic else tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
        key = (graph.name, fixed)
        if key not in self._engines:
            self._engines[key] = self.backend.open(self.bundle, graph, shapes)
        return self._engines[key]

    def run(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph on host arrays and return its outputs on the host.

        Every call binds its engine anew, which on a GPU may take longer than running it.
        """
        graph = self.bundle.graph(name)
        try:
            engine = self.engine(graph, {name: array.shape for name, array in inputs.items()})
            return run_once(self.backend.device, engine, graph, inputs, self.stream)
        finally:
            if self.low_memory:
                self.release(graph.stage)

    def workspace(self, inputs: Mapping[str, Array], arrays: Mapping[str, Array]) -> Workspace:
        """Return the workspace of a request's shapes: the one that is kept, or a new one."""
        key = tuple((name, array.shape) for name, array in {**inputs, **arrays}.items())
        workspace = self._workspaces.pop(key, None)
        if workspace is None:
            if len(self._workspaces) >= MAX_WORKSPACES:
                self._workspaces.popitem(last=False)[1].close()
            release = self.release if self.low_memory else None
            workspace = Workspace(self.backend.device, self.bundle, self.engine, inputs, arrays, release)
        self._workspaces[key] = workspace
        return workspace

    def release(self, stage: Stage) -> None:
        """Close the engines of a stage."""
        names = {graph.name for graph in self.bundle.manifest.graphs if graph.stage == stage}
        for key in [key for key in self._engines if key[0] in names]:
            self._engines.pop(key).close()

    def close(self) -> None:
        """Free all engines and memory once a running request is done; calling it again does nothing.

        In a fork of the process that opened it nothing is freed: the threads of its engines are not there.
        """
        if os.getpid() != self._process:
            return
        with self.backend.lock:
            if self._busy:
                raise RequestError("a callback closed its own pipeline: raise an exception to end the request")
            for workspace in self._workspaces.values():
                workspace.close()
            for engine in self._engines.values():
                engine.close()
            self._workspaces.clear()
            self._engines.clear()
            self.stream.close()
            self._closed = True


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def _leak_in_child() -> None:
    """Keep the engines of a forked process for ever: their destructors wait for threads that a fork does not have."""
    for session in _SESSIONS:
        for engine in session._engines.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_in_child)
