"""`Attention` nodes of ONNX graphs, rewritten for libraries that are better at, or only know, another form of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EngineError, MissingExtraError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FUSED = {"q_num_heads", "kv_num_heads", "scale"}
"""Attributes of an `Attention` that `MultiHeadAttention` can express."""
_PLAIN = {*_FUSED, "is_causal", "qk_matmul_output_mode", "softcap", "softmax_precision"}


def load_graph(path: Path, extra: str) -> ModelProto:
    """Read an ONNX file without its external data; `extra` brings the package that this takes."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(extra, "rewriting a graph for this backend") from error
    return onnx.load(path, load_external_data=False)


def fuse(model: ModelProto) -> None:
    """Turn every unmasked `Attention` on [B, L, heads·size] into ONNX Runtime's `MultiHeadAttention`.

    Its kernels are flash-like on the CPU, and flash, cuDNN or CUTLASS on a GPU, where releases before 1.25 run the
    standard operator on the CPU. Masked attention (text encoders) stays as it is.
    """
    from onnx import helper

    for node in model.graph.node:
        attributes = _attributes(node)
        if node.op_type == "Attention" and len(node.input) == 3 and attributes and not set(attributes) - _FUSED:
            kept = {"num_heads": attributes["q_num_heads"]}
            if "scale" in attributes:
                kept["scale"] = attributes["scale"]
            node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(name, value) for name, value in kept.items())
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def expand(model: ModelProto) -> None:
    """Turn every `Attention` into MatMul, Softmax, MatMul.

    TensorRT before 10.14 cannot read the operator; it finds and fuses the pattern. Takes the forms that the exporter
    writes: [B, L, heads·size] with the number of heads, or [B, heads, L, size], and a mask that broadcasts to the
    scores. Raises `EngineError` for any other.
    """
    from onnx import shape_inference

    if not any(node.op_type == "Attention" for node in model.graph.node):
        return
    inferred = shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.input)}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_expanded(node, types) if node.op_type == "Attention" else [node])
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _expanded(node: NodeProto, types: dict[str, Any]) -> Iterator[NodeProto]:
    """Yield the nodes that stand for one `Attention`."""
    import numpy as np
    from onnx import helper, numpy_helper

    attributes, name = _attributes(node), node.output[0]
    heads = attributes.get("q_num_heads")
    query, sizes = types.get(node.input[0]), _sizes(types.get(node.input[0]))
    masked = len(node.input) > 3 and bool(node.input[3])
    plain = len(node.output) == 1 and len(node.input) <= 4 and not set(attributes) - _PLAIN
    if (
        not plain
        or attributes.get("is_causal")
        or attributes.get("softcap")
        or attributes.get("kv_num_heads", heads) != heads
        or query is None
        or len(sizes) != (3 if heads else 4)
        or not sizes[-1]
    ):
        raise EngineError(f"the Attention {node.name or name} has a form that cannot be expanded for this library")
    dtype = helper.tensor_dtype_to_np_dtype(query.elem_type)
    scale = attributes.get("scale", 1 / math.sqrt(sizes[-1] / (heads or 1)))

    def make(kind: str, inputs: list[str], tag: str, **options: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [f"{name}/{tag}"], name=f"{name}/{tag}", **options)

    def constant(value: Any, tag: str) -> NodeProto:
        return make("Constant", [], tag, value=numpy_helper.from_array(np.array(value), f"{name}/{tag}"))

    queries, keys, values = node.input[:3]
    yield constant(np.array(scale, dtype), "scale")
    if heads:
        yield constant(np.array([0, 0, heads, -1], np.int64), "apart")
        yield constant(np.array([0, 0, -1], np.int64), "together")
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        for tag, source, order in zip("qkv", (queries, keys, values), orders, strict=True):
            yield make("Reshape", [source, f"{name}/apart"], f"{tag}_heads")
            yield make("Transpose", [f"{name}/{tag}_heads"], tag, perm=order)
        queries, values = f"{name}/q", f"{name}/v"
    else:
        yield make("Transpose", [keys], "k", perm=[0, 1, 3, 2])
    yield make("Mul", [queries, f"{name}/scale"], "scaled")
    yield make("MatMul", [f"{name}/scaled", f"{name}/k"], "scores")
    scores = f"{name}/scores"
    if masked:
        mask = node.input[3]
        if types[mask].elem_type == 9:  # bool: true where a key is seen
            yield constant(np.array(0, dtype), "seen")
            yield constant(np.array(np.finfo(dtype).min, dtype), "hidden")
            yield make("Where", [mask, f"{name}/seen", f"{name}/hidden"], "bias")
            mask = f"{name}/bias"
        yield make("Add", [scores, mask], "masked")
        scores = f"{name}/masked"
    yield make("Softmax", [scores], "weights", axis=-1)
    if not heads:
        yield helper.make_node("MatMul", [f"{name}/weights", values], [name], name=name)
        return
    yield make("MatMul", [f"{name}/weights", values], "mixed")
    yield make("Transpose", [f"{name}/mixed"], "mixed_heads", perm=[0, 2, 1, 3])
    yield helper.make_node("Reshape", [f"{name}/mixed_heads", f"{name}/together"], [name], name=name)


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _sizes(tensor: Any) -> list[int]:
    """Return the sizes of a tensor type, 0 where they are symbolic."""
    return [size.dim_value for size in tensor.shape.dim] if tensor is not None else []
