"""The range of the step graph's plans: one for each size and batch serves every sampler, number of steps and guidance.

All but guidance by skipped layers, which has a branch more.

What a request does not use is not computed: sizes inside the range are those of its own tables. What a range costs a
step on a GPU, beside fixed shapes, has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..bundle import GraphInfo
from ..engine import Shapes, Sizes, shape_of, solve_sizes
from ..errors import RequestError

FREE: Mapping[str, tuple[int, int, int]] = {
    "T": (1, 128, 65536),
    "H": (1, 1, 10),
    "D": (1, 1, 2048),
    "G": (1, 2, 3),
}
"""Smallest, usual and largest value of each size that is free: table rows of all images, history slots, noise tensors
drawn for an image, guidance branches."""

ADVICE = {
    "T": "table rows: give fewer steps, or fewer pictures of a batch",
    "H": "tensors of history: choose another sampler, or no forecast",
    "D": "noise tensors of an image: give fewer steps or a smaller size, or choose a sampler that draws no noise",
    "G": "guidance branches: export the checkpoint again",
}
CHECKED = {"T": 128, "D": 16}
"""Table rows and drawn noise of the largest shapes that a plan is checked at."""

LARGEST_TENSOR = 2**31 - 1
"""Elements that a tensor of TensorRT may have."""


def step_shapes(graph: GraphInfo, shapes: Sequence[Shapes]) -> list[Shapes]:
    """Return input shapes that span a graph's range: those given, or for a step graph what it is tuned for first.

    Raises `RequestError` for what lies outside the range.
    """
    inputs = {spec.name: spec for spec in graph.inputs}
    best: list[Shapes] = []
    ends: list[Shapes] = []
    for each in shapes:
        sizes = solve_sizes(inputs, each)
        if not sizes.keys() >= FREE.keys():
            return list(shapes)
        cells = math.prod(shape_of(inputs["noise"], {**sizes, "D": 1}))
        most = {name: high for name, (_, _, high) in FREE.items()}
        most["D"] = min(most["D"], LARGEST_TENSOR // cells)
        if sizes["G"] <= FREE["G"][1]:  # few requests have a branch more: they have a plan of their own
            most["G"] = FREE["G"][1]
        for name, high in most.items():
            if sizes[name] > high:
                raise RequestError(f"the step takes {sizes[name]} of at most {high} {ADVICE[name]}")
        usual = {name: min(middle, most[name]) for name, (_, middle, _) in FREE.items()}
        for target, chosen in ((best, usual), (ends, most), (ends, {name: low for name, (low, _, _) in FREE.items()})):
            all_sizes = _complete(sizes, chosen)
            target.append({name: shape_of(spec, all_sizes) for name, spec in inputs.items()})
    return [best[0], *ends]


def checked_shapes(graph: GraphInfo, shapes: Shapes) -> Shapes:
    """Return shapes to check a plan at in place of its largest: tables that grow without another kernel stay small."""
    inputs = {spec.name: spec for spec in graph.inputs}
    sizes = solve_sizes(inputs, shapes)
    if not sizes.keys() >= FREE.keys():
        return shapes
    sizes |= {name: min(sizes[name], most) for name, most in CHECKED.items()}
    return {name: shape_of(spec, sizes) for name, spec in inputs.items()}


def _complete(sizes: Sizes, free: Sizes) -> Sizes:
    """Return the sizes of the step graph that follow from those that are free: R rows, P lines, K and L columns.

    Rows that are not those of all branches of all images are shared out among them, and stay as many.
    """
    branches, history = free["G"], free["H"]
    shared = sizes["R"] != sizes["B"] * sizes["G"]
    return {
        **sizes,
        **free,
        "R": sizes["R"] if shared else sizes["B"] * branches,
        "P": 1 + history,
        "K": 3 + branches + history,
        "L": 1 + branches,
    }
