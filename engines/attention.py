"""`Attention` nodes of ONNX graphs, rewritten for libraries that are better at, or only know, another form of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FUSED = {"q_num_heads", "kv_num_heads", "scale"}
"""Attributes of an `Attention` that `MultiHeadAttention` can express."""
_EXPANDED = {*_FUSED, "is_causal"}
"""Attributes of an `Attention` that plain operators can stand for."""
_OFF_AT_ZERO = ("is_causal", "qk_matmul_output_mode", "softcap")
"""Attributes that say nothing when they are zero."""
_HIDDEN, _HIDDEN_HALF = -1.7e38, -32752.0
"""What hides a score by being added to it: half the lowest number, of float16 for the second, so that no sum overflows.
"""


class _Kind(NamedTuple):
    """Element type and sizes of a tensor: None where it has no known shape, a symbol for a size that changes."""

    element: int
    sizes: tuple[int | str, ...] | None


def rewrite(model: ModelProto, *, fuse: bool = False, expand: bool = False, expand_masked_causal: bool = False) -> None:
    """Replace the `Attention` nodes of a graph; a form that neither way covers stays as it is.

    `fuse`: unmasked attention on [B, L, heads·size] becomes ONNX Runtime's `MultiHeadAttention`. Its kernels are
    flash-like on the CPU, and flash, cuDNN or CUTLASS on a GPU, where releases before 1.25 run the standard operator on
    the CPU. A mask for all queries alike, of an `Attention` that stays, is repeated for each: ONNX Runtime refuses it.

    `expand`: any other becomes MatMul, Softmax, MatMul. TensorRT before 10.14 cannot read the operator; it finds and
    fuses this pattern. Covered are the forms that the exporter writes: [B, L, heads·size] with the numbers of heads, or
    [B, heads, L, size] with static heads, the keys' dividing the queries'; with or without a mask that broadcasts to
    the scores; causal or not, whatever the lengths. Without `scale` the size of a head must be static too.

    `expand_masked_causal`: one that is causal and has a mask as well does so. TensorRT takes one of the two.
    """
    from onnx import helper

    if not any(node.op_type == "Attention" for node in model.graph.node):
        return
    kinds = _kinds(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Attention":
            nodes.append(node)
        elif fuse and _fusible(node, kinds):
            _fuse(node)
            nodes.append(node)
        elif (expand or (expand_masked_causal and _masked_causal(node))) and _expandable(node, kinds):
            nodes.extend(_expanded(node, kinds))
        elif fuse and _mask_is_narrow(node, kinds):
            nodes.extend(_with_wide_mask(node))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if fuse and not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _fusible(node: NodeProto, kinds: Mapping[str, _Kind]) -> bool:
    from onnx import TensorProto

    if node.input[0] in kinds and kinds[node.input[0]].element == TensorProto.BFLOAT16:
        return False  # `MultiHeadAttention` has no such kernels
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


def _masked_causal(node: NodeProto) -> bool:
    return any(node.input[3:4]) and "is_causal" in _attributes(node)


def _mask_is_narrow(node: NodeProto, kinds: Mapping[str, _Kind]) -> bool:
    """Tell whether a mask may have no axis of queries, or one of size 1."""
    if not any(node.input[3:4]):
        return False
    sizes = kinds[node.input[3]].sizes if node.input[3] in kinds else None
    if sizes is None or len(sizes) < 2:
        return True
    query = kinds.get(node.input[0], _Kind(0, None)).sizes
    length = query[-2 if len(query) == 4 else 1] if query and len(query) in (3, 4) else ""
    return sizes[-2] == 1 or (isinstance(sizes[-2], str) and (not sizes[-2] or sizes[-2] != length))


def _with_wide_mask(node: NodeProto) -> list[NodeProto]:
    """Return the nodes of an `Attention` whose mask is repeated for each query."""
    write = _Nodes(node.output[0])
    axis = 1 if _attributes(node).get("q_num_heads") else 2
    length = write.add("Shape", [node.input[0]], "queries", start=axis, end=axis + 1)
    one = write.integers([1], "one")
    node.input[3] = write.add(
        "Expand", [node.input[3], write.add("Concat", [length, one], "wide", axis=0)], "wide_mask"
    )
    return [*write.nodes, node]


def _expandable(node: NodeProto, kinds: Mapping[str, _Kind]) -> bool:
    attributes = _attributes(node)
    flat = "q_num_heads" in attributes
    query = kinds.get(node.input[0])
    heads = _heads(node, kinds)
    if query is None or heads is None or heads[0] % heads[1]:
        return False
    size = query.sizes[-1] if query.sizes else ""
    return (
        not any(node.output[1:])
        and not any(node.input[4:])
        and not set(attributes) - _EXPANDED
        and (query.sizes is None or len(query.sizes) == (3 if flat else 4))
        and ("scale" in attributes or (isinstance(size, int) and size > 0))
        and (not any(node.input[3:4]) or node.input[3] in kinds)
    )


def _heads(node: NodeProto, kinds: Mapping[str, _Kind]) -> tuple[int, int] | None:
    """Return the numbers of heads of queries and of keys and values; None where they are unknown or contradictory."""
    attributes = _attributes(node)
    if "q_num_heads" in attributes:
        return attributes["q_num_heads"], attributes.get("kv_num_heads", attributes["q_num_heads"])
    shapes = [kinds[name].sizes if name in kinds else None for name in node.input[:3]]
    queries, keys, values = (sizes[1] if sizes and len(sizes) == 4 else "" for sizes in shapes)
    if isinstance(queries, int) and isinstance(keys, int) and keys > 0 and keys == values:
        return queries, keys
    return None


def _expanded(node: NodeProto, kinds: Mapping[str, _Kind]) -> list[NodeProto]:
    """Return the nodes that stand for one `Attention`."""
    write, query, heads = _Nodes(node.output[0]), kinds[node.input[0]], _heads(node, kinds)
    assert heads is not None
    flat = "q_num_heads" in _attributes(node)
    q, k, v = node.input[:3]
    if flat:
        q, v = write.apart(q, heads[0], "q"), write.apart(v, heads[1], "v")
        k = write.apart(k, heads[1], "k", perm=(0, 2, 3, 1))
    else:
        k = write.add("Transpose", [k], "k", perm=[0, 1, 3, 2])
    if heads[0] > heads[1]:  # each head of keys serves as many of queries that follow each other
        serving = write.integers([head * heads[1] // heads[0] for head in range(heads[0])], "serving")
        k, v = (write.add("Gather", [each, serving], f"{tag}_repeated", axis=1) for tag, each in (("k", k), ("v", v)))
    q = write.add("Mul", [q, write.number(_scale(node, query), query.element, "scale")], "scaled")
    scores = write.add("MatMul", [q, k], "scores")
    for bias in _biases(node, kinds, write, scores):
        scores = write.add("Add", [scores, bias], f"{bias.rpartition('/')[2]}_added")
    weights = write.add("Softmax", [scores], "weights", axis=-1)
    if flat:
        mixed = write.add("Transpose", [write.add("MatMul", [weights, v], "mixed")], "mixed_heads", perm=[0, 2, 1, 3])
        write.last("Reshape", [mixed, write.integers([0, 0, -1], "together")])
    else:
        write.last("MatMul", [weights, v])
    return write.nodes


def _scale(node: NodeProto, query: _Kind) -> float:
    attributes = _attributes(node)
    if "scale" in attributes:
        return float(attributes["scale"])
    assert query.sizes is not None
    return 1 / math.sqrt(int(query.sizes[-1]) / attributes.get("q_num_heads", 1))


def _biases(node: NodeProto, kinds: Mapping[str, _Kind], write: _Nodes, scores: str) -> Iterator[str]:
    """Yield what is to be added to the scores: a mask of numbers, and one bias for all that is not seen."""
    from onnx import TensorProto, helper

    element = kinds[node.input[0]].element
    mask = node.input[3] if any(node.input[3:4]) else ""
    seen = []
    if mask and kinds[mask].element == TensorProto.BOOL:  # true where a key is seen
        seen.append(mask)
    elif mask:
        yield mask if kinds[mask].element == element else write.add("Cast", [mask], "mask", to=element)
    if _attributes(node).get("is_causal"):  # query i sees the keys up to i, whatever the lengths
        lengths = write.add("Shape", [scores], "lengths", start=-2)
        yes = helper.make_tensor("", TensorProto.BOOL, [1], [True])
        ones = write.add("ConstantOfShape", [lengths], "all", value=yes)
        seen.append(write.add("Trilu", [ones], "earlier", upper=0))
    if seen:
        both = seen[0] if len(seen) == 1 else write.add("And", seen, "seen")
        hidden = _HIDDEN_HALF if element == TensorProto.FLOAT16 else _HIDDEN
        choice = [write.number(0.0, element, "shown"), write.number(hidden, element, "hidden")]
        yield write.add("Where", [both, *choice], "bias")


class _Nodes:
    """The nodes that stand for one, named after its output."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.nodes: list[NodeProto] = []

    def add(self, kind: str, inputs: Sequence[str], tag: str, **options: Any) -> str:
        """Add a node and return the name of what it gives."""
        from onnx import helper

        name = f"{self.output}/{tag}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **options))
        return name

    def last(self, kind: str, inputs: Sequence[str]) -> None:
        """Add the node that gives what the one that is replaced gave."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [self.output], name=self.output))

    def number(self, value: float, element: int, tag: str) -> str:
        """Add a scalar."""
        from onnx import helper

        return self.add("Constant", [], tag, value=helper.make_tensor(tag, element, [], [value]))

    def integers(self, values: Sequence[int], tag: str) -> str:
        """Add a list of integers."""
        from onnx import TensorProto, helper

        return self.add("Constant", [], tag, value=helper.make_tensor(tag, TensorProto.INT64, [len(values)], values))

    def apart(self, source: str, heads: int, tag: str, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        """Add what takes [B, L, heads·size] to [B, heads, L, size], or to another order of [B, L, heads, size]."""
        shape = self.integers([0, 0, heads, -1], f"{tag}_apart")
        return self.add("Transpose", [self.add("Reshape", [source, shape], f"{tag}_heads")], tag, perm=perm)


def _attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes, without those that say nothing."""
    from onnx import helper

    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value for name, value in values.items() if value or name not in _OFF_AT_ZERO}


def _kinds(model: ModelProto) -> dict[str, _Kind]:
    """Return what is known of every tensor of a graph."""
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    kinds = {t.name: _Kind(t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    for value in (*inferred.value_info, *inferred.output, *inferred.input):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim if tensor.HasField("shape") else None
        sizes = None if dims is None else tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
        kinds[value.name] = _Kind(tensor.elem_type, sizes)
    return kinds
