"""Attention as one ONNX node, which an engine can fuse or expand as it likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset23 as op

HEADS_OUT = [0, 2, 1, 3]
"""Between [B, L, heads, size] and [B, heads, L, size]."""

ABSENT_IS_ZERO = ("is_causal", "qk_matmul_output_mode", "softcap")


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """PyTorch's scaled_dot_product_attention on [B, heads, L, size], its scale always written.

    Libraries take the scale that a node leaves out from sizes that they may not know.
    """
    size = query.shape[-1]
    if scale is None and not isinstance(size, int):
        raise ValueError(f"attention over heads of unknown size {size}: its scale cannot be written")
    scale = 1 / math.sqrt(size) if scale is None else scale
    return op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))[0]


def join_heads(model: ir.Model) -> None:
    """Let attention between layouts of heads read and write [B, L, heads·size] itself.

    Reshape, Transpose, Attention, Transpose, Reshape becomes one node with numbers of heads, which kernels are made
    for. Anything else between a projection and its attention, such as norms or rotations of heads, leaves the node as
    it is.
    """
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain:
            for name in ABSENT_IS_ZERO:
                if name in node.attributes and not node.attributes[name].value:
                    del node.attributes[name]
            _join(node)


def _join(node: ir.Node) -> None:
    query, key, value = (_joined(node.inputs[i]) for i in range(3))
    together = _merged(node.outputs[0])
    if query is None or key is None or value is None or together is None or any(v.uses() for v in node.outputs[1:]):
        return
    heads = {"q_num_heads": query[1], "kv_num_heads": key[1]}
    if key[1] != value[1] or "q_num_heads" in node.attributes:
        return
    for index, (tensor, _) in enumerate((query, key, value)):
        node.replace_input_with(index, tensor)
    for name, count in heads.items():
        node.attributes[name] = ir.AttrInt64(name, count)
    node.outputs[0].shape = together.shape
    ir.convenience.replace_all_uses_with(together, node.outputs[0], replace_graph_outputs=True)


def _joined(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return [B, L, heads·size] and its number of heads, of which a value is [B, heads, L, size]."""
    transpose = _producer(value, "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or not _turns(transpose):
        return None
    whole, apart = reshape.inputs[0], reshape.outputs[0]
    if whole is None or whole.shape is None or apart.shape is None or (len(whole.shape), len(apart.shape)) != (3, 4):
        return None
    heads, size = apart.shape[2], apart.shape[3]
    fits = isinstance(heads, int) and isinstance(size, int) and whole.shape[2] == heads * size
    return (whole, heads) if fits and whole.shape[0] == apart.shape[0] else None  # type: ignore[return-value]


def _merged(value: ir.Value) -> ir.Value | None:
    """Return the [B, L, heads·size] that a value [B, heads, L, size] becomes, where it becomes nothing else."""
    transpose = _only_user(value, "Transpose")
    reshape = _only_user(transpose.outputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or not _turns(transpose):
        return None
    apart, whole = transpose.outputs[0], reshape.outputs[0]
    if whole.shape is None or apart.shape is None or (len(whole.shape), len(apart.shape)) != (3, 4):
        return None
    heads, size = apart.shape[2], apart.shape[3]
    fits = isinstance(heads, int) and isinstance(size, int) and whole.shape[2] == heads * size
    return whole if fits and whole.shape[0] == apart.shape[0] else None


def _turns(node: ir.Node) -> bool:
    order = node.attributes.get_ints("perm", ())
    return list(order) == HEADS_OUT


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and not node.domain else None


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    users: Sequence[Any] = tuple(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    node: ir.Node = users[0].node
    return node if node.op_type == kind and not node.domain else None
