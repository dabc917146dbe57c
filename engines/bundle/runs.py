"""What an engine of a graph must reproduce: recorded rows where they fit its shapes, and otherwise the next best.

Rows that the bundle recorded are run at an engine's smallest and its largest batch. A graph that comes from no module
is its own definition, and ONNX's reference implementation computes what it gives. Other shapes have no reference:
there, equal rows must give equal results at every batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..device import Array
from ..engine import Shapes, Sizes, shape_of, solve_sizes
from ..errors import reason
from ..onnx_graph import graph_files, load_graph
from .manifest import GraphInfo
from .reader import Bundle
from .references import read_reference

Ranges = tuple[Shapes, Shapes]
"""The smallest and the largest input shapes that an engine is for."""

BATCHES = (1, 4)
"""The batches at which an engine for every batch is checked."""
CELLS = 512
"""Rows times latent cells up to which an engine for every size is checked: larger ones take seconds on a processor."""
SIDE = 8
"""Height and width in cells for an engine for every size whose bundle has no rows."""
SMALL_GRAPH = 1 << 20
"""Bytes up to which a graph that comes from no module is computed by ONNX's reference implementation."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Inputs of one run and the outputs to expect of it, by name."""

    sizes: Sizes
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    """Empty where there is no reference: all rows of the inputs are equal, and those of the next run as well."""
    origin: str = "the reference"
    """What the expected outputs come from, in words."""


def runs(bundle: Bundle, graph: GraphInfo, ranges: Ranges | None) -> Iterator[Run]:
    """Yield the runs that an engine must reproduce; `ranges` is None for one that takes every shape.

    Raises `BundleError` when recorded rows are damaged.
    """
    recorded = False
    for run in _recorded(bundle, graph, ranges):
        recorded = True
        yield run
    extremes = None if recorded else _extremes(graph, ranges)
    if extremes is None:
        return
    low, high = extremes
    if (computed := _computed(bundle, graph, [low, high] if low != high else [low])) is not None:
        yield from computed
        return
    symbol = batch_symbol(graph)
    row = random_inputs(graph, {**high, symbol: 1} if symbol else high)
    for sizes in [{**high, symbol: low[symbol]}, high] if symbol and low[symbol] != high[symbol] else [high]:
        yield Run(sizes, {n: repeated(a, sizes[symbol]) for n, a in row.items()} if symbol else row, {})


def batch_symbol(graph: GraphInfo) -> str | None:
    """Return the symbol that is the first size of every input, which counts rows; None without one."""
    first = {spec.shape[0] if spec.shape else None for spec in graph.inputs}
    symbol = first.pop() if len(first) == 1 else None
    return symbol if isinstance(symbol, str) and symbol.isidentifier() else None


def repeated(rows: Array, count: int) -> Array:
    """Return rows repeated, or cut, to a count."""
    return rows[np.arange(count) % len(rows)]


def random_inputs(graph: GraphInfo, sizes: Sizes) -> dict[str, Array]:
    """Return values for every input: in [0, limit) where the graph has one, otherwise normally distributed."""
    generator, inputs = np.random.default_rng(0), {}
    for spec in graph.inputs:
        shape, limit = shape_of(spec, sizes), graph.limits.get(spec.name)
        whole = np.dtype(spec.dtype).kind != "f"
        if isinstance(limit, str):
            limit = sizes[limit]
        elif limit is None and whole:  # 0 is right for every index
            limit = {"bool": 2, "uint8": 256}.get(spec.dtype, 1)
        values = generator.standard_normal(shape) if limit is None else generator.random(shape) * limit
        inputs[spec.name] = (np.floor(values) if whole else values).astype(spec.dtype)
    return inputs


def _recorded(bundle: Bundle, graph: GraphInfo, ranges: Ranges | None) -> Iterator[Run]:
    """Yield the recorded rows that an engine takes, repeated to its smallest and its largest batch."""
    symbol = batch_symbol(graph) if graph.parity is not None else None
    specs = {spec.name: spec for spec in graph.inputs}
    batches: tuple[int, ...] = BATCHES
    if ranges is not None:
        batches = tuple(solve_sizes(specs, shapes).get(symbol or "", 1) for shapes in ranges)
    for reference in graph.references:
        wanted: list[Sizes] = []
        for sizes in [{**reference.sizes, symbol: batch} if symbol else dict(reference.sizes) for batch in batches]:
            if _takes(graph, sizes, ranges, affordable=symbol is None) and sizes not in wanted:
                wanted.append(sizes)
        rows = read_reference(bundle, graph, reference) if wanted else {}
        for sizes in wanted:
            arrays = {n: repeated(array, sizes[symbol]) for n, array in rows.items()} if symbol else rows
            expected = {spec.name: arrays[spec.name] for spec in graph.outputs}
            yield Run(sizes, {name: arrays[name] for name in specs}, expected)


def _takes(graph: GraphInfo, sizes: Sizes, ranges: Ranges | None, *, affordable: bool) -> bool:
    """Tell whether an engine is checked at these sizes."""
    if ranges is None:
        return (
            affordable or math.prod(sizes.get(letter, 1) for letter in (batch_symbol(graph) or "", "h", "w")) <= CELLS
        )
    return all(
        all(a <= n <= b for a, n, b in zip(low, shape_of(spec, sizes), high, strict=True))
        for spec, low, high in ((spec, ranges[0][spec.name], ranges[1][spec.name]) for spec in graph.inputs)
    )


def _extremes(graph: GraphInfo, ranges: Ranges | None) -> tuple[Sizes, Sizes] | None:
    """Return the smallest and the largest sizes to check an engine at without recorded rows; None for neither."""
    if ranges is not None:
        specs = {spec.name: spec for spec in graph.inputs}
        return solve_sizes(specs, ranges[0]), solve_sizes(specs, ranges[1])
    letters, symbol = graph.letters, batch_symbol(graph)
    if set(letters) - {symbol, "h", "w"}:  # such sizes may depend on each other
        return None
    low, high = ({letter: batch if letter == symbol else SIDE for letter in letters} for batch in BATCHES)
    return low, high


def _computed(bundle: Bundle, graph: GraphInfo, each: Sequence[Sizes]) -> list[Run] | None:
    """Return runs of a small graph that comes from no module, or None where its outputs cannot be computed."""
    if graph.parity is not None or len(graph.files) > 1 or bundle.manifest.files[graph.files[0]].size > SMALL_GRAPH:
        return None
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError:  # engines that were built elsewhere need no onnx
        return None
    model, names = load_graph(graph_files(bundle, graph, "cpu")[0], "cpu"), [spec.name for spec in graph.outputs]
    found = []
    try:
        evaluator = ReferenceEvaluator(model)
        for sizes in each:
            inputs = random_inputs(graph, sizes)
            outputs = [np.asarray(output) for output in evaluator.run(names, inputs)]
            if any(o.shape != shape_of(spec, sizes) for o, spec in zip(outputs, graph.outputs, strict=True)):
                return None  # the check of the engine itself says so
            found.append(Run(sizes, inputs, dict(zip(names, outputs, strict=True)), "ONNX's reference implementation"))
    except MemoryError:
        raise
    except Exception as error:  # an operator that it does not know, or whatever its numpy code raises
        log.info("graph %s is not computed by ONNX's reference implementation: %s", graph.name, reason(error))
        return None
    return found
