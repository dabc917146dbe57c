"""Operations and bytes of ONNX graphs, and how near a measured run came to the machine's limit.

Operations are those of convolutions, matrix products and attention, a multiplication and an addition counted as two;
everything else is small beside them. Bytes are the least that a run must move: weights, inputs and outputs, each once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from ...engines.bundle import Bundle
from ...engines.errors import BundleError
from ...runtime.prompt.tokenizer import Tokenizer
from ...runtime.shapes import requested_shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one run of a graph asks of a machine."""

    operations: float
    bytes: float

    def limit_seconds(self, flops: float, bandwidth: float) -> float:
        """Return the least time a machine with this ceiling needs: its arithmetic and its memory work side by side."""
        return max(self.operations / flops, self.bytes / bandwidth)


def graph_cost(
    bundle: Bundle, name: str, *, batch: int, guidance: float, height: int, width: int, prompt: str | None = None
) -> Cost:
    """Count one graph of a bundle for a request; sizes in pixels. Weights are not read.

    Where prompts are filled up to one of several lengths, `prompt` says to which (default: the longest).
    """
    embedded = bundle.manifest.guidance.scale != "guidance_scale"  # a number that the network reads: no rows of its own
    tokenizers = [Tokenizer(bundle.file(info.file), info) for info in bundle.manifest.tokenizers if info.lengths]
    tokens = None if prompt is None else max((each.encode(prompt).used for each in tokenizers), default=None)
    scale = None if embedded else guidance
    shapes = requested_shapes(bundle, width, height, batch, guidance_scale=scale, prompt_tokens=tokens)
    return count(bundle.path / bundle.graph(name).files[0], {k: tuple(shape) for k, shape in shapes[name].items()})


def count(file: Path, inputs: Mapping[str, Shape]) -> Cost:
    """Count a graph file for concrete input shapes.

    Raises `BundleError` when the shape of a counted operator cannot be inferred.
    """
    model = onnx.load(file, load_external_data=False)
    shapes = infer_shapes(model, inputs)
    operations = 0.0
    for node in model.graph.node:
        if counter := _COUNTERS.get(node.op_type):
            given, made = ([shapes.get(name) for name in names] for names in (node.input, node.output))
            try:
                operations += counter(_attributes(node), given, made)
            except (TypeError, IndexError) as error:
                raise BundleError(f"{file.name}: the shapes of {node.op_type} {node.name} are not known") from error
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if (
            node.op_type == "Gather" and node.input[0] in types
        ):  # of an embedding table only the rows looked up are read
            types[node.output[0]] = types.pop(node.input[0])
    moved = sum(math.prod(shapes[name]) * _width(kind) for name, kind in types.items())
    return Cost(operations, float(moved))


def infer_shapes(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shape of every tensor of a graph, node by node from concrete input shapes.

    Sizes that the graph itself computes (`Shape`, then arithmetic) are computed along the way, which onnx's own
    inference does only in part.
    """
    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    types = {v.name: _tensor_type(v.type.tensor_type.elem_type, inputs.get(v.name)) for v in graph.input}
    types |= {t.name: _tensor_type(t.data_type, tuple(t.dims)) for t in graph.initializer}
    small = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    for node in graph.node:
        shape = _shape(types.get(node.input[0])) if node.input else None
        if node.op_type == "Shape" and shape is not None:
            small[node.output[0]] = np.array(shape, np.int64)[
                slice(*(_attributes(node).get(k) for k in ("start", "end")))
            ]
        elif all(name in small for name in node.input if name):
            given = {name: small[name] for name in node.input if name}
            computed: Any = ReferenceEvaluator(node).run(None, given)
            small |= zip(node.output, computed, strict=True)
        known = {name: types[name] for name in node.input if name in types}
        data = {name: onnx.numpy_helper.from_array(small[name]) for name in node.input if name in small}
        for name in node.output:
            if name in small:
                kind = onnx.helper.np_dtype_to_tensor_dtype(small[name].dtype)
                types[name] = _tensor_type(kind, small[name].shape)
        if all(name in types for name in node.output):
            continue
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        types |= onnx.shape_inference.infer_node_outputs(schema, node, known, data, opset_imports=_opset_list(opsets))
        if _shape(types.get(node.output[0])) is None and node.op_type in _SAME_SHAPE:
            types[node.output[0]] = types[node.input[0]]
    found = {name: _shape(kind) for name, kind in types.items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def _opset_list(opsets: Mapping[str, int]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]


def _tensor_type(element_type: int, shape: Sequence[int] | None) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(element_type, shape)


def _shape(kind: onnx.TypeProto | None) -> Shape | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    sizes = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in sizes) if all(d.HasField("dim_value") for d in sizes) else None


def _is_small(tensor: onnx.TensorProto) -> bool:
    return math.prod(tensor.dims) <= 64 and not onnx.external_data_helper.uses_external_data(tensor)


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _width(element_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def _convolution(attributes: dict[str, Any], given: Sequence[Any], made: Sequence[Any]) -> float:
    kernel = given[1]  # [out, in / groups, …]
    return 2.0 * math.prod(made[0]) * math.prod(kernel[1:])


def _transposed_convolution(attributes: dict[str, Any], given: Sequence[Any], made: Sequence[Any]) -> float:
    kernel = given[1]  # [in, out / groups, …]
    return 2.0 * math.prod(given[0]) * math.prod(kernel[1:])


def _product(attributes: dict[str, Any], given: Sequence[Any], made: Sequence[Any]) -> float:
    return 2.0 * math.prod(made[0]) * given[0][-1]


def _gemm(attributes: dict[str, Any], given: Sequence[Any], made: Sequence[Any]) -> float:
    return 2.0 * math.prod(made[0]) * given[0][0 if attributes.get("transA") else 1]


def _attention(attributes: dict[str, Any], given: Sequence[Any], made: Sequence[Any]) -> float:
    """Q·Kᵀ and the product with V: [B, heads, L, size] or [B, L, heads·size] for each of the three."""
    query, key, value = given[:3]
    if len(query) == 4:
        return 2.0 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    heads = attributes.get("q_num_heads", 1) / attributes.get("kv_num_heads", attributes.get("q_num_heads", 1))
    return 2.0 * query[0] * query[1] * key[1] * (query[2] + value[2] * heads)


_SAME_SHAPE = ("GroupNormalization",)
_COUNTERS = {
    "Conv": _convolution,
    "FusedConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "FusedMatMul": _product,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
