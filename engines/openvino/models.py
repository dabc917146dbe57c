"""The compiled models of one graph: one for each of the shapes in use, and one that takes every shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from ..engine import Shapes

Compile = Callable[[Shapes | None], Any]
"""Returns a model compiled for input shapes, or for every shape."""
Fixed = tuple[tuple[str, tuple[int, ...]], ...]


class CompiledModels:
    """Models compiled for the shapes that bindings have; when there are too many, others share one for every shape."""

    def __init__(self, most: int, load: Compile) -> None:
        """`most` models are kept for shapes of their own; the least recently bound goes first, and none in use does."""
        self._most, self._load = most, load
        self._fixed: OrderedDict[Fixed, tuple[Any, WeakSet[Any]]] = OrderedDict()
        self._any: Any = None
        self._lock = threading.RLock()

    def take(self, shapes: Shapes, user: object = None) -> Any:
        """Return the model for input shapes, which stays theirs as long as a user lives."""
        key = tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
        with self._lock:
            if key not in self._fixed:
                self._make_room()
                if len(self._fixed) >= self._most:
                    self._any = self._any or self._load(None)
                    return self._any
                self._fixed[key] = self._load(dict(key)), WeakSet()
            self._fixed.move_to_end(key)
            compiled, users = self._fixed[key]
            if user is not None:
                users.add(user)
            return compiled

    def _make_room(self) -> None:
        """Let go of models that nobody uses, the oldest first, until there is room for one more."""
        for key in list(self._fixed):
            if len(self._fixed) < self._most:
                break
            if not self._fixed[key][1]:
                del self._fixed[key]
