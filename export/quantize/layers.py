"""The layers of a network in an ONNX graph, and their 8-bit marks: pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ...engines.device import Array
from ...engines.errors import RequestError

KINDS = ("Conv", "MatMul", "Gemm")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LARGEST: Mapping[int, float] = {TensorProto.INT8: 127.0, TensorProto.FLOAT8E4M3FN: 448.0}
"""The largest number of each 8-bit type."""


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with a weight: the node that computes it, and the module that it comes from."""

    node: str
    name: str


def layers_of(graph: GraphProto) -> list[Layer]:
    """Return a graph's layers in the order in which they run."""
    weights = {tensor.name for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type in KINDS and not node.domain and node.input[1] in weights]
    return [Layer(node.name, _module(node.input[1])) for node in found]


def _module(weight: str) -> str:
    """Return the name of a weight's module: `down_blocks.0.resnets.0.conv1` of `unet.down_blocks.0.….weight.T`."""
    return weight.removesuffix(".T").removesuffix(".weight").partition(".")[2] or weight


def borders(graph: GraphProto, layers: Iterable[Layer]) -> set[Layer]:
    """Return the layers that no other layer comes before, on the way from any input, or after, on the way out."""
    by_node = {layer.node: layer for layer in layers}
    found, behind, before = set(), set[str](), {value.name for value in graph.output}
    for node in graph.node:
        inside = not behind.isdisjoint(node.input)
        if node.name in by_node and not inside:
            found.add(by_node[node.name])
        if node.name in by_node or inside:
            behind.update(node.output)
    for node in reversed(graph.node):
        if before.isdisjoint(node.output):
            continue
        if node.name in by_node:
            found.add(by_node[node.name])
        else:
            before.update(node.input)
    return found


def named(layers: Sequence[Layer], patterns: Iterable[str]) -> set[Layer]:
    """Return the layers whose names match a pattern, in which `*` stands for anything.

    Raises `RequestError` for a pattern that matches none.
    """
    found = set()
    for pattern in patterns:
        matching = {layer for layer in layers if fnmatchcase(layer.name, pattern)}
        if not matching:
            raise RequestError(
                f"--keep {pattern!r} is no layer of this denoiser: its layers are {layers[0].name}, …, "
                f"{layers[-1].name}, and * stands for anything"
            )
        found |= matching
    return found


def name_nodes(graph: GraphProto) -> None:
    """Give a name of its own to every node that has none, or another's."""
    known = set[str]()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in known:
            node.name = f"{node.op_type}_{number}_of_{len(graph.node)}"
        known.add(node.name)


def without(model: ModelProto, nodes: Collection[str]) -> ModelProto:
    """Return a copy of a model in which the nodes of these names read their inputs as they were before the marks."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in nodes:
            for place, name in enumerate(node.input):
                last = made.get(name)
                if last is not None and last.op_type == DEQUANTIZE:
                    node.input[place] = made[last.input[0]].input[0]
    _prune(graph)
    return copy


def _prune(graph: GraphProto) -> None:
    """Remove marks that nothing reads any more, and tensors that no node reads."""
    read = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if node.op_type not in (QUANTIZE, DEQUANTIZE) or not read.isdisjoint(node.output):
            read.update(node.input)
            kept.append(node)
    names = {name for node in kept for name in node.output}
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    values = [value for value in graph.value_info if value.name in names]
    for field, left in ((graph.node, kept[::-1]), (graph.initializer, weights), (graph.value_info, values)):
        del field[:]
        field.extend(left)


def fold(model: ModelProto, folder: Path) -> None:
    """Store marked weights in 8 bits, in place: DequantizeLinear is what is left of their marks.

    `folder` holds the model's external data.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    stored: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == QUANTIZE and node.input[0] in tensors:
            weight, scale, zero = (tensors[name] for name in node.input)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            values = _in_8_bits(numpy_helper.to_array(weight, str(folder)), _array(scale, folder), axis, zero.data_type)
            name = f"{weight.name}.8"
            graph.initializer.append(helper.make_tensor(name, zero.data_type, values.shape, values.tobytes(), raw=True))
            stored[node.output[0]] = name
    for node in graph.node:
        if node.op_type == DEQUANTIZE and node.input[0] in stored:
            node.input[0] = stored[node.input[0]]
    _prune(graph)


def _in_8_bits(weight: Array, scale: Array, axis: int, kind: int) -> Array:
    """Return a weight over its scale [n], along `axis`, as QuantizeLinear rounds it: to the nearest, ties to even."""
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[axis] = scale.size
    largest = LARGEST[kind]
    values = np.clip(weight.astype(np.float32) / scale.astype(np.float32).reshape(shape), -largest, largest)
    if kind == TensorProto.INT8:
        return np.rint(values).astype(np.int8)
    return values.astype(ml_dtypes.float8_e4m3fn)


def _array(tensor: TensorProto, folder: Path) -> Array:
    return np.asarray(numpy_helper.to_array(tensor, str(folder)))
