"""Convolutions over 3×3 in half the products: four rows at a time, after Winograd.

Rows 4t to 4t+3 of a convolution are read from six rows. Three taps in four places are twelve products of a weight and
a number; six suffice, each of a sum of rows and a sum of taps, whose sums are the four rows (Toom and Cook, as in
Lavin and Gray, https://arxiv.org/abs/1509.09308, here along one axis alone). The taps of the other axis stay as they
are: what is left is six convolutions over 1×3 on a quarter of the rows, which every engine has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

ROWS = 4
"""Rows of an output that are computed together."""

NEAR, FAR = 5 / 8, 3 / 2
POINTS = (0.0, NEAR, -NEAR, FAR, -FAR)
"""Where polynomials are evaluated, beside infinity. Those of the paper are 0, 1, -1, 2 and -2: with these the error in
bfloat16 is a third less."""

LEAST_PIXELS, LEAST_CHANNELS = 256, 256
"""Pixels of an output, and channels that come in and go out, from which a convolution is taken. For fewer pixels
reading the weights is much of the time, and here there are twice as many; with fewer channels the sums cost as much as
the products that they save."""


@contextmanager
def output_pixels(module: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Yield how many pixels a convolution's output had when it last ran inside the block, by its weight's name."""
    pixels: dict[str, int] = {}

    def watch(name: str, _: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        pixels[f"{name}.weight"] = output.shape[-2] * output.shape[-1]

    convolutions = {name: each for name, each in module.named_modules() if isinstance(each, torch.nn.Conv2d)}
    handles = [each.register_forward_hook(partial(watch, name)) for name, each in convolutions.items()]
    try:
        yield pixels
    finally:
        for handle in handles:
            handle.remove()


def fewer_products(model: ir.Model, pixels: Mapping[str, int]) -> int:
    """Compute a model's convolutions over 3×3 four rows at a time, in fp32, and return how many there were.

    `pixels` is how many pixels their outputs usually have, by the name of the weight; others stay as they are. Works
    for any height. Weights become twice as many.
    """
    graph = model.graph
    found = [node for node in graph if _fits(node) and _pays(node, pixels)]
    write = _Writer()
    for node in found:
        write.tape = Tape()
        rows = _convolution(node, write)
        rows.name = node.outputs[0].name
        weight = node.inputs[1]
        graph.insert_before(node, write.tape.nodes)
        for value in write.tape.initializers:
            graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], rows, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if weight is not None and not weight.uses():
            graph.initializers.pop(str(weight.name), None)
    if found:
        graph.insert_before(graph[0], write.constants.nodes)
    return len(found)


class _Writer:
    """Writes the nodes of one convolution after the other, and constants as nodes that all of them share.

    As initializers they might end in the file of the weights, where not every reader looks for sizes.
    """

    def __init__(self) -> None:
        self.tape, self.constants = Tape(), Tape()
        self._known = dict[tuple[int, ...] | float, ir.Value]()
        self._kernels = dict[ir.Value, list[ir.Value]]()

    def op(self, kind: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Write a node and return its output."""
        return self.tape.op(kind, inputs, attributes)

    def kernels(self, weight: ir.Value) -> list[ir.Value]:
        """Return the six that stand for a weight, which several convolutions may read."""
        if weight not in self._kernels:
            assert weight.const_value is not None
            self._kernels[weight] = [
                self.tape.initializer(taps, name=f"{weight.name}.{number}")
                for number, taps in enumerate(_sums_of_taps(weight.const_value))
            ]
        return self._kernels[weight]

    def whole(self, *numbers: int) -> ir.Value:
        """Return a list of integers."""
        return self._constant(numbers, np.array(numbers, np.int64))

    def times(self, value: ir.Value, factor: float) -> ir.Value:
        """Write a product with a number."""
        return self.op("Mul", [value, self._constant(factor, np.array(factor, np.float32))])

    def _constant(self, key: tuple[int, ...] | float, array: np.ndarray) -> ir.Value:
        if key not in self._known:
            self._known[key] = self.constants.op("Constant", [], {"value": ir.tensor(array)})
        return self._known[key]


def _fits(node: ir.Node) -> bool:
    """Whether a node is a convolution over 3×3 that leaves heights and widths as they are, its weights known."""
    if node.op_type != "Conv" or node.domain or node.inputs[1] is None:
        return False
    weight = node.inputs[1].const_value
    return (
        weight is not None
        and weight.dtype == ir.DataType.FLOAT
        and list(weight.shape)[2:] == [3, 3]
        and list(node.attributes.get_ints("pads", ())) == [1, 1, 1, 1]
        and set(node.attributes.get_ints("strides", (1,))) == {1}
        and set(node.attributes.get_ints("dilations", (1,))) == {1}
        and node.attributes.get_int("group", 1) == 1
    )


def _pays(node: ir.Node, pixels: Mapping[str, int]) -> bool:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    channels = weight.const_value.shape.numpy()[:2]
    return pixels.get(str(weight.name), 0) >= LEAST_PIXELS and min(channels) >= LEAST_CHANNELS


def _convolution(node: ir.Node, write: _Writer) -> ir.Value:
    """Write the nodes that compute what a convolution does, and return their result."""
    picture, weight, bias = (*node.inputs, None)[:3]
    assert picture is not None and weight is not None
    height, width = (write.op("Shape", [picture], start=axis, end=axis + 1) for axis in (2, 3))
    rows = _six_rows(picture, height, width, write)
    products = [
        write.op("Conv", [row, kernel], pads=[0, 1, 0, 1], kernel_shape=[1, 3])
        for row, kernel in zip(_sums_of_rows(rows, write), write.kernels(weight), strict=True)
    ]
    found = _four_rows(products, write)
    if bias is not None:
        column = write.op("Reshape", [bias, write.whole(-1, 1, 1)])
        found = [write.op("Add", [row, column]) for row in found]
    whole = _with_width(write.op("Concat", found, axis=3), width, write)
    return write.op("Slice", [whole, write.whole(0), height, write.whole(2)])


def _with_width(picture: ir.Value, width: ir.Value, write: _Writer) -> ir.Value:
    """Cut or join rows: four that follow each other are one of four times the width, number by number."""
    return write.op("Reshape", [picture, write.op("Concat", [write.whole(0, 0, -1), width], axis=0)])


def _six_rows(picture: ir.Value, height: ir.Value, width: ir.Value, write: _Writer) -> list[ir.Value]:
    """Return rows 4t-1 to 4t+4 of a picture for every t, zeros above and below it."""
    missing = write.op("Mod", [write.op("Neg", [height]), write.whole(ROWS)])
    pads = write.op("Concat", [write.whole(0, 0, 0, 0, 0, 0), missing, write.whole(0)], axis=0)
    fours = _with_width(write.op("Pad", [picture, pads]), write.op("Mul", [width, write.whole(ROWS)]), write)
    four = write.tape.op_multi_out("Split", [fours], {"axis": 3, "num_outputs": ROWS}, num_outputs=ROWS)
    above = write.op("Pad", [four[-1], write.whole(0, 0, 1, 0, 0, 0, -1, 0)])
    below = write.op("Pad", [four[0], write.whole(0, 0, -1, 0, 0, 0, 1, 0)])
    return [above, *four, below]


def _sums_of_rows(rows: Sequence[ir.Value], write: _Writer) -> Iterator[ir.Value]:
    """Yield what is multiplied at each of the points and at infinity: rows times the coefficients of polynomials.

    That of a point is the product of x - p over all other points p, that of infinity the one over all points.
    """
    near, far = NEAR**2, FAR**2

    def outer(six: Sequence[ir.Value]) -> ir.Value:  # (x² - near)(x² - far)
        upper = write.op("Sub", [six[4], write.times(six[2], near + far)])
        return write.op("Add", [upper, write.times(six[0], near * far)])

    yield outer(rows)
    for point, other in ((NEAR, far), (FAR, near)):  # x (x + point) (x² - other), and with -point
        even = write.op("Sub", [rows[4], write.times(rows[2], other)])
        odd = write.times(write.op("Sub", [rows[3], write.times(rows[1], other)]), point)
        yield write.op("Add", [even, odd])
        yield write.op("Sub", [even, odd])
    yield outer(rows[1:])


def _sums_of_taps(weight: ir.TensorProtocol) -> list[ir.LazyTensor]:
    """Return a weight [O, C, 3, 3] as [O, C, 1, 3] for each of the points and for infinity, computed when written."""

    def sums(factors: np.ndarray) -> ir.TensorProtocol:
        taps = np.einsum("h,ochw->ocw", factors, weight.numpy(), dtype=np.float64)
        return ir.tensor(taps[:, :, None, :].astype(np.float32))

    factors = [
        np.array([1.0, point, point**2]) / np.prod([point - other for other in POINTS if other != point])
        for point in POINTS
    ]
    shape = ir.Shape([*weight.shape.numpy()[:2], 1, 3])
    return [
        ir.LazyTensor(partial(sums, each), dtype=ir.DataType.FLOAT, shape=shape)
        for each in (*factors, np.array([0.0, 0.0, 1.0]))
    ]


def _four_rows(products: Sequence[ir.Value], write: _Writer) -> list[ir.Value]:
    """Return the rows of an output: products at points times powers of the points."""
    middle, infinity = products[0], products[5]
    sums, differences = ([write.op(kind, products[i : i + 2]) for i in (1, 3)] for kind in ("Add", "Sub"))

    def combined(pair: Sequence[ir.Value], power: int) -> ir.Value:
        return write.op("Add", [write.times(pair[0], NEAR**power), write.times(pair[1], FAR**power)])

    return [
        write.op("Add", [middle, write.op("Add", sums)]),
        combined(differences, 1),
        combined(sums, 2),
        write.op("Add", [infinity, combined(differences, 3)]),
    ]
