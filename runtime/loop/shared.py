"""Engines, and graphs bound once, that workspaces share: each is let go of when no workspace uses it any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from ...engines.backends import Backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Array
from ...engines.engine import Engine, Shapes
from .workspace import BoundGraph

Key = tuple[str, Any]
"""A graph and the input shapes that something was opened for; no shapes where one engine serves them all."""

BOUND = "bound "
"""Before the name of a graph in keys of bindings."""

PART_OF_FREE_MEMORY = 3 / 4
"""How much of a GPU's free memory a session may fill by default; the rest is for the next shape to open in."""


def default_budget(backend: Backend) -> int | None:
    """Return the bytes that may be in use on a GPU; the host's memory is left to the number of kept shapes."""
    memory = backend.device.memory_free()
    return None if memory is None else backend.device.bytes_taken() + int(memory[0] * PART_OF_FREE_MEMORY)


class SharedEngines:
    """What is open of a bundle on a backend, by graph and shapes."""

    def __init__(self, bundle: Bundle, backend: Backend, used: Callable[[], set[Key]]) -> None:
        """`used` tells the keys that workspaces and the running request need."""
        self._bundle, self._backend, self._used = bundle, backend, used
        self.engines: dict[Key, Engine] = {}
        self._bound: dict[Key, BoundGraph] = {}

    def key(self, graph: GraphInfo, shapes: Shapes) -> Key:
        """Return the key of a graph's engine for input shapes."""
        return graph.name, None if self._backend.dynamic else _fixed(shapes)

    def engine(self, graph: GraphInfo, shapes: Shapes) -> Engine:
        """Return a graph's engine for input shapes, opened when it is not; others that nobody uses are closed first."""
        key = self.key(graph, shapes)
        if key not in self.engines:
            self.let_go()
            self.engines[key] = self._backend.open(self._bundle, graph, shapes)
        return self.engines[key]

    def bound(self, graph: GraphInfo, inputs: Mapping[str, Array]) -> tuple[BoundGraph, set[Key]]:
        """Return a graph bound for the shapes of its inputs, and the keys that stand for its use."""
        shapes = {name: array.shape for name, array in inputs.items()}
        key = (BOUND + graph.name, _fixed(shapes))
        if key not in self._bound:
            engine = self.engine(graph, shapes)
            self._bound[key] = BoundGraph(self._backend.device, engine, graph, inputs)
        return self._bound[key], {key, self.key(graph, shapes)}

    def memory(self) -> Iterator[tuple[str, int, int]]:
        """Yield graphs, several times perhaps, with bytes of weights and of buffers of their own; on any thread."""
        for (name, _), engine in list(self.engines.items()):
            yield name, engine.nbytes, 0
        for (name, _), bound in list(self._bound.items()):
            yield name.removeprefix(BOUND), 0, bound.nbytes

    def let_go(self) -> None:
        """Close what nobody uses; engines that serve every shape stay."""
        used = self._used()
        with ExitStack() as closing:
            for key in [] if self._backend.dynamic else [key for key in self.engines if key not in used]:
                closing.callback(self.engines.pop(key).close)
            for key in [key for key in self._bound if key not in used]:
                closing.callback(self._bound.pop(key).close)  # runs before its engine is closed

    def release(self, graphs: set[str]) -> None:
        """Close the engines of some graphs, used or not."""
        with ExitStack() as closing:
            for key in [key for key in self.engines if key[0] in graphs]:
                closing.callback(self.engines.pop(key).close)

    def close(self) -> None:
        """Close everything; calling it again does nothing."""
        with ExitStack() as closing:
            for engine in reversed(self.engines.values()):
                closing.callback(engine.close)
            for bound in self._bound.values():  # before the engines
                closing.callback(bound.close)
            self.engines.clear()
            self._bound.clear()


def _fixed(shapes: Shapes) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
