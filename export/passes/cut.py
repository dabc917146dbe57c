"""Where a denoiser is taken apart: which nodes leave the loop, and what of theirs it reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Conv")
KEPT = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "BOOL")
"""Element types of what is kept; bfloat16 is float32 at the border of a graph."""


class Cut:
    """Which nodes leave the loop, and which of their values the loop reads."""

    def __init__(self, graph: ir.Graph, usual: Mapping[str, int], steps: int) -> None:
        self._graph, self._usual, self._steps = graph, usual, steps
        self.reads: dict[ir.Value, frozenset[str]] = {}
        """The inputs of the graph that a value depends on."""
        for value in graph.inputs:
            self.reads[value] = frozenset({str(value.name)})
        for node in graph:
            found = frozenset().union(*(self.reads.get(value, frozenset()) for value in _inputs(node)))
            self.reads |= dict.fromkeys(node.outputs, found)
        self._long = {
            str(value.name) for value in graph.inputs if any(_is_letter(n) for n in list(value.shape or ())[1:])
        }
        products = [node for node in graph if self._is_worth(node)]
        types = Counter(node.outputs[0].dtype for node in products if "timestep" in self.reads[node.outputs[0]])
        self._type = types.most_common(1)[0][0] if types else None
        products = [node for node in products if self._is_keepable(node.outputs[0])]
        self._hoisted = self._with_ancestors(products)
        self._extend()

    def kept(self) -> tuple[list[ir.Value], list[ir.Value]]:
        """Return the values of hoisted nodes that the loop reads, and the inputs of the graph that it still reads."""
        found: set[ir.Value] = set()
        read = self._walk(self._graph.outputs, found)
        made = [value for node in self._graph for value in node.outputs if value in found]
        return made, [value for value in self._graph.inputs if value in read]

    def inputs_of(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """Return the graph's inputs that values are computed from."""
        read = self._walk(values, None)
        return [value for value in self._graph.inputs if value in read]

    def _walk(self, values: Iterable[ir.Value], kept: set[ir.Value] | None) -> set[ir.Value]:
        """Go back from values to inputs, which are returned; where `kept` is a set, no further than hoisted nodes.

        What cannot be kept, such as a size, is computed on both sides.
        """
        waiting, seen = list(values), set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.producer()
            if node is None:
                continue
            if kept is not None and node in self._hoisted and self._is_keepable(value):
                kept.add(value)
            else:
                waiting += _inputs(node)
        return seen

    def _is_invariant(self, node: ir.Node) -> bool:
        read = self.reads[node.outputs[0]]
        return bool(read) and "model_input" not in read

    def _is_worth(self, node: ir.Node) -> bool:
        """Tell whether a node is a product with more weights than numbers would be kept of it."""
        if node.op_type not in PRODUCTS or node.domain or not self._is_invariant(node):
            return False
        value = node.outputs[0]
        weights = sum(v.const_value.size for v in _inputs(node) if v.const_value is not None)
        return self._is_sized(value) and weights >= self._numbers(value)

    def _is_sized(self, value: ir.Value) -> bool:
        """Tell whether a value has rows whose size is known; what is repeated for timesteps has no tokens."""
        first, *others = list(value.shape or ("",))
        if str(first) != "R" or not others or value.dtype is None or value.dtype.name not in KEPT:
            return False
        read = self.reads[value]
        if "timestep" in read:
            return all(isinstance(size, int) for size in others) and not read & self._long
        return all(isinstance(size, int) or str(size) in self._usual for size in others)

    def _is_keepable(self, value: ir.Value) -> bool:
        return self._is_sized(value) and ("timestep" not in self.reads[value] or value.dtype == self._type)

    def _numbers(self, value: ir.Value) -> int:
        """Return how many numbers are kept of a value for one row."""
        sizes = (size if isinstance(size, int) else self._usual[str(size)] for size in list(value.shape or ())[1:])
        return math.prod(sizes) * (self._steps if "timestep" in self.reads[value] else 1)

    def _with_ancestors(self, nodes: Iterable[ir.Node]) -> set[ir.Node]:
        found, waiting = set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [made for value in _inputs(node) if (made := value.producer()) is not None]
        return found

    def _extend(self) -> None:
        """Let nodes follow what they read, where no more numbers are kept for it."""
        for node in self._graph:
            if node in self._hoisted or not self._is_invariant(node) or not all(map(self._is_keepable, node.outputs)):
                continue
            made = {value for value in _inputs(node) if value.producer() is not None}
            if not made or any(value.producer() not in self._hoisted for value in made):
                continue
            users = {value: {use.node for use in value.uses()} for value in made}
            freed = [v for v in made if self._is_keepable(v) and users[v] <= {*self._hoisted, node}]
            if freed and sum(map(self._numbers, freed)) >= sum(map(self._numbers, node.outputs)):
                self._hoisted.add(node)


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _is_letter(size: object) -> bool:
    return not isinstance(size, int)
