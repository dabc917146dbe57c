"""What all requests to a bundle share on a backend: engines, workspaces, a stream, and whose turn it is."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ...engines.backends import Backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Array
from ...engines.engine import Engine, Shapes
from ...engines.errors import EngineError, RequestError
from ...engines.progress import Progress, silent
from ..prompt.cache import PromptCache
from .decoding import GRAPHS, WHOLE, Decoding
from .denoise import OpenEngine
from .shared import Key, SharedEngines, default_budget
from .single import SingleGraphs
from .wiring import shapes_of_rows, wired_shapes
from .workspace import Workspace

MAX_WORKSPACES = 4
"""Request shapes whose buffers, engines and captured graphs are kept; the least recently used goes first."""


class Session(SingleGraphs):
    """A bundle open on a backend. One request runs at a time, on all sessions of a backend: others wait their turn."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        low_memory: bool = False,
        memory_budget: int | None = None,
        prompt_cache: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open the engines that every request needs; with `low_memory` each stage opens its own and closes them.

        `memory_budget` is the bytes of the device's memory in use above which kept shapes are let go of, `prompt_cache`
        those of the host's for what prompts were encoded to. Raises `RequestError` for numbers that cannot be.
        """
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
            raise RequestError(f"memory_budget is {memory_budget!r}: give bytes, 1 or more, or leave it out")
        self.prompts = PromptCache(bundle, prompt_cache)
        self.bundle = bundle
        self.backend = backend
        self.low_memory = low_memory
        self.kept = MAX_WORKSPACES
        self._keepers = 0  # that want all of them meanwhile
        self.evictions = 0
        """Workspaces that were let go of for others or for the memory budget."""
        self.stream = backend.device.stream()
        self._taken_before = backend.device.bytes_taken()
        self._workspaces: OrderedDict[Key, Workspace] = OrderedDict()
        self._shared = SharedEngines(bundle, backend, self._used)
        self._wanted: set[Key] = set()  # by the running request, before a workspace answers for it
        self._held: list[set[Key]] = []  # by those who came for engines alone
        self._busy = self._closed = False
        self._process = os.getpid()
        _SESSIONS.add(self)
        # most requests start from noise, and end in the full decoder
        graphs = [g for g in bundle.manifest.graphs if g.stage != "image" and g.name != GRAPHS["tiny"]]
        try:
            self._budget = default_budget(backend) if memory_budget is None else memory_budget
            for number, graph in enumerate(graphs if backend.dynamic and not low_memory else []):
                progress(f"opening {graph.name}", number, len(graphs))
                self._shared.engine(graph, {})
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
                self._wanted = set()
                self._shrink()

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
        return {name for name, _ in self._shared.engines}

    @property
    def bytes_taken(self) -> int:
        """Bytes of the device's memory that have gone to this process since the session was opened."""
        return self.backend.device.bytes_taken() - self._taken_before

    def keeps(
        self,
        inputs: Mapping[str, Array],
        arrays: Mapping[str, Array],
        decoding: Decoding = WHOLE,
        asked: tuple[int, ...] = (),
    ) -> bool:
        """Tell whether there is a workspace of a request's shapes, which runs the branches that steps ask for."""
        kept = self._workspaces.get(_key(inputs, arrays, decoding))
        return kept is not None and kept.loop.binds(asked)

    def prepare(
        self,
        inputs: Mapping[str, Array],
        arrays: Mapping[str, Array],
        picture: tuple[int, ...] | None = None,
        decoding: Decoding = WHOLE,
        asked: tuple[int, ...] = (),
    ) -> None:
        """Build the engines that a request of these shapes lacks, with an initial picture [1, H, W, 3] or without.

        `asked` is as in `DenoiseLoop.load`. Raises `MissingPlanError` where the backend builds none.
        """
        images, denoiser = len(arrays["latents"]), self.bundle.graph("denoiser")
        kept = self.keeps(inputs, arrays, decoding, asked)
        shapes = {} if kept else wired_shapes(self.bundle, inputs, arrays, decoding)
        for branches in {*asked} - {len(arrays["model_input"]) // images} if shapes else ():  # plans of their own
            rows = shapes_of_rows(denoiser, shapes["denoiser"], branches * images)
            self.backend.prepare(self.bundle, {"denoiser": rows})
        if picture is not None:
            specs = self.bundle.graph("image_encoder").inputs
            shapes["image_encoder"] = {spec.name: (*picture[:3], int(spec.shape[3])) for spec in specs}
        if shapes:
            self.backend.prepare(self.bundle, shapes)

    def workspace(
        self, inputs: Mapping[str, Array], arrays: Mapping[str, Array], decoding: Decoding = WHOLE
    ) -> Workspace:
        """Return the workspace of a request's shapes: the one that is kept, or a new one."""
        key, wanted = _key(inputs, arrays, decoding), self._wanted
        if key in self._workspaces:
            self._workspaces.move_to_end(key)
        else:
            own: set[Key] = set()
            if not self.backend.dynamic:
                self.prepare(inputs, arrays, decoding=decoding)  # before anything is let go of for it
                shapes = wired_shapes(self.bundle, inputs, arrays, decoding)
                own = {self._shared.key(self.bundle.graph(name), each) for name, each in shapes.items()}
            self._wanted = wanted | own
            self._shrink(room=1)
            release = self.release if self.low_memory else None

            def engine(graph: GraphInfo, shapes: Shapes) -> Engine:
                own.add(self._shared.key(graph, shapes))
                return self._shared.engine(graph, shapes)

            workspace = Workspace(self.backend.device, self.bundle, engine, inputs, arrays, release, decoding)
            workspace.uses = own
            self._workspaces[key] = workspace
        self._workspaces[key].uses |= wanted
        self._wanted = wanted
        return self._workspaces[key]

    def _shrink(self, room: int = 0) -> None:
        """Let go of the least recently used workspaces while there are too many or memory is over its budget.

        `room` is for so many more.
        """
        device, most = self.backend.device, math.inf if self._keepers else self.kept - room
        while len(self._workspaces) > most or (
            self._budget is not None and len(self._workspaces) > 1 - room and device.bytes_taken() > self._budget
        ):
            self._workspaces.popitem(last=False)[1].close()
            self.evictions += 1
            self._shared.let_go()
        self._shared.let_go()

    def _used(self) -> set[Key]:
        return self._wanted.union(*self._held, *(workspace.uses for workspace in self._workspaces.values()))

    def hold(self, uses: set[Key]) -> OpenEngine:
        """Return what opens engines that stay open, whatever requests come and go, until `let_go` of their keys.

        `uses` takes the keys, and is what `let_go` is told.
        """
        self._held.append(uses)

        def open_engine(graph: GraphInfo, shapes: Shapes) -> Engine:
            uses.add(self._shared.key(graph, shapes))
            return self._shared.engine(graph, shapes)

        return open_engine

    def keep(self, uses: set[Key]) -> None:
        """Let what the running request has come for stay, as what is held for `uses`."""
        uses |= self._wanted

    def let_go(self, uses: set[Key]) -> None:
        """Close the engines that were held for `uses` alone; calling it again does nothing."""
        self._held = [each for each in self._held if each is not uses]
        self._shared.let_go()

    @contextmanager
    def keep_all(self) -> Iterator[None]:
        """Keep every shape that is opened inside the block, and as many from then on, unless memory is over budget."""
        with self.backend.lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self.backend.lock:
                self._keepers -= 1
                self.kept = max(self.kept, len(self._workspaces))

    def close(self) -> None:
        """Free all engines and memory once a running request is done; calling it again does nothing.

        In a fork of the process that opened it nothing is freed: the threads of its engines are not there.
        """
        if os.getpid() != self._process:
            return
        with self.backend.lock:
            if self._busy:
                raise RequestError("a callback closed its own pipeline: raise an exception to end the request")
            self._closed = True
            with ExitStack() as closing:
                closing.callback(self.stream.close)
                closing.callback(self._shared.close)
                while self._workspaces:
                    closing.callback(self._workspaces.popitem()[1].close)


def _key(inputs: Mapping[str, Array], arrays: Mapping[str, Array], decoding: Decoding) -> Key:
    return "workspace", (decoding, *((name, array.shape) for name, array in {**inputs, **arrays}.items()))


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def _leak_in_child() -> None:
    """Keep the engines of a forked process for ever: their destructors wait for threads that a fork does not have."""
    for session in _SESSIONS:
        for engine in session._shared.engines.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_in_child)
