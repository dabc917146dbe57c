"""The engine face: typed tensors in and out, bound once, enqueued without waiting."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .bundle import GraphInfo, TensorInfo
from .device import Stream, Tensor
from .errors import ShapeError

Sizes = dict[str, int]

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors by name."""

_TERM = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?:\+(\d+))?")


class BoundEngine(Protocol):
    """An engine with every input and output bound to a tensor: ready to run, again and again."""

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one execution; returns without waiting for the device."""


class Engine(Protocol):
    """A graph ready for execution on one device."""

    @property
    def name(self) -> str:
        """The graph's name."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        """The graph's inputs by name."""

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """The graph's outputs by name."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, as files have them; its part of those that it shares with other engines."""

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundEngine:
        """Bind all inputs and the wanted outputs; addresses are fixed from here on.

        Raises `ShapeError` when a tensor is missing, unknown, or of the wrong type or shape.
        """

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""


def solve_sizes(specs: Mapping[str, TensorInfo], shapes: Mapping[str, Sequence[int]]) -> Sizes:
    """Return the value of every symbol in `specs` from concrete shapes.

    A symbolic size is a name, optionally with a factor and an offset (`8*h`, `S+1`). Raises `ShapeError` when a shape
    contradicts its spec or another shape.
    """
    sizes: Sizes = {}
    for name, spec in specs.items():
        if name not in shapes:
            continue
        shape = tuple(shapes[name])
        if len(shape) != len(spec.shape):
            raise ShapeError(f"{name} has shape {list(shape)}, the graph takes {list(spec.shape)}")
        for given, wanted in zip(shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                symbol, factor, offset = _parse(wanted)
                value, rest = divmod(given - offset, factor)
                fits = rest == 0 and value >= 0 and sizes.setdefault(symbol, value) == value
            else:
                fits = given == wanted
            if not fits:
                known = f" with {sizes}" if sizes else ""
                raise ShapeError(f"{name} has shape {list(shape)}, the graph takes {list(spec.shape)}{known}")
    return sizes


def shape_of(spec: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the concrete shape of a tensor for the given symbol values, or raise `ShapeError`."""
    shape = []
    for size in spec.shape:
        if isinstance(size, str):
            symbol, factor, offset = _parse(size)
            if symbol not in sizes:
                raise ShapeError(f"the size {size!r} of {spec.name} is not known from {sorted(sizes)}")
            size = factor * sizes[symbol] + offset
        shape.append(size)
    return tuple(shape)


def check_binding(graph: GraphInfo | Engine, tensors: Mapping[str, Tensor]) -> Sizes:
    """Check tensors against a graph's inputs and outputs and return the symbol values.

    Every input must be there; outputs that nobody wants may be left out.
    """
    if isinstance(graph, GraphInfo):
        inputs, outputs = {t.name: t for t in graph.inputs}, {t.name: t for t in graph.outputs}
    else:
        inputs, outputs = dict(graph.inputs), dict(graph.outputs)
    specs: dict[str, TensorInfo] = {**inputs, **outputs}
    if missing := sorted(set(inputs) - set(tensors)):
        raise ShapeError(f"graph {graph.name} has no tensor for its input {missing[0]!r}")
    if unknown := sorted(set(tensors) - set(specs)):
        raise ShapeError(f"graph {graph.name} has no input or output {unknown[0]!r}; it has {', '.join(specs)}")
    for name, tensor in tensors.items():
        if tensor.dtype != np.dtype(specs[name].dtype):
            raise ShapeError(f"{name} of graph {graph.name} is {specs[name].dtype}, the tensor is {tensor.dtype}")
    return solve_sizes(specs, {name: tensor.shape for name, tensor in tensors.items()})


def _parse(size: str) -> tuple[str, int, int]:
    match: Any = _TERM.fullmatch(size.replace(" ", ""))
    if not match:  # an expression of some other form stands for itself
        return size, 1, 0
    factor, symbol, offset = match.groups()
    return symbol, int(factor or 1), int(offset or 0)
