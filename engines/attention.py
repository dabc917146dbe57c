"""`Attention` nodes of ONNX graphs, rewritten for libraries that are better at, or only know, another form of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FUSED = {"q_num_heads", "kv_num_heads", "scale"}
"""Attributes of an `Attention` that `MultiHeadAttention` can express."""
_EXPANDED = {*_FUSED, "is_causal", "qk_matmul_output_mode", "softcap"}
"""Attributes of an `Attention` that plain operators can stand for, when those that are not of `_FUSED` are zero."""


def rewrite(model: ModelProto, *, fuse: bool = False, expand: bool = False) -> None:
    """Replace the `Attention` nodes of a graph; a form that neither way covers stays as it is.

    `fuse`: unmasked attention on [B, L, heads·size] becomes ONNX Runtime's `MultiHeadAttention`. Its kernels are
    flash-like on the CPU, and flash, cuDNN or CUTLASS on a GPU, where releases before 1.25 run the standard operator on
    the CPU.

    `expand`: any other becomes MatMul, Softmax, MatMul. TensorRT before 10.14 cannot read the operator; it finds and
    fuses this pattern. Covered are the forms that the exporter writes: [B, L, heads·size] with the number of heads, or
    [B, heads, L, size], with or without a mask that broadcasts to the scores.
    """
    from onnx import helper, shape_inference

    if not any(node.op_type == "Attention" for node in model.graph.node):
        return
    inferred = shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.input)}
    masks = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    masks |= {name: kind.elem_type for name, kind in types.items()}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Attention" and fuse and _fusible(node):
            _fuse(node)
            nodes.append(node)
        elif node.op_type == "Attention" and expand and _expandable(node, types, masks):
            nodes.extend(_expanded(node, types, masks))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if fuse and not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _fusible(node: NodeProto) -> bool:
    attributes = _attributes(node)
    heads = attributes.get("q_num_heads")
    one = len(node.input) == 3 and not any(node.output[1:])
    return bool(one and heads and heads == attributes.get("kv_num_heads") and not set(attributes) - _FUSED)


def _fuse(node: NodeProto) -> None:
    from onnx import helper

    attributes = _attributes(node)
    kept = {"num_heads": attributes["q_num_heads"]}
    if "scale" in attributes:
        kept["scale"] = attributes["scale"]
    node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in kept.items())


def _expandable(node: NodeProto, types: dict[str, Any], masks: dict[str, int]) -> bool:
    attributes = _attributes(node)
    heads = attributes.get("q_num_heads", 0)
    sizes = _sizes(types.get(node.input[0]))
    return (
        not any(node.output[1:])
        and not any(node.input[4:])
        and not set(attributes) - _EXPANDED
        and not any(attributes.get(name) for name in _EXPANDED - _FUSED)
        and attributes.get("kv_num_heads", heads) == heads
        and len(sizes) == (3 if heads else 4)
        and sizes[-1] > 0
        and (not any(node.input[3:4]) or node.input[3] in masks)
    )


def _expanded(node: NodeProto, types: dict[str, Any], masks: dict[str, int]) -> Iterator[NodeProto]:
    """Yield the nodes that stand for one `Attention`."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    attributes, name = _attributes(node), node.output[0]
    heads, query = attributes.get("q_num_heads", 0), types[node.input[0]]
    dtype = helper.tensor_dtype_to_np_dtype(query.elem_type)
    scale = attributes.get("scale", 1 / math.sqrt(_sizes(query)[-1] / (heads or 1)))

    def make(kind: str, inputs: list[str], tag: str, **options: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [f"{name}/{tag}"], name=f"{name}/{tag}", **options)

    def constant(value: Any, kind: Any, tag: str) -> NodeProto:
        return make("Constant", [], tag, value=numpy_helper.from_array(np.array(value, kind), f"{name}/{tag}"))

    queries, keys, values = node.input[:3]
    yield constant(scale, dtype, "scale")
    if heads:
        yield constant([0, 0, heads, -1], np.int64, "apart")
        yield constant([0, 0, -1], np.int64, "together")
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
    if any(node.input[3:4]):
        mask = node.input[3]
        if masks[mask] == TensorProto.BOOL:  # true where a key is seen
            yield constant(0, dtype, "seen")
            yield constant(np.finfo(dtype).min / 2, dtype, "hidden")  # a score added to it must not overflow
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
