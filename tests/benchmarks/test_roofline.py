from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrt.benchmarks.measure.roofline import Cost, count, graph_cost
from latentrt.benchmarks.report import tables
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import BundleError
from onnx import TensorProto, helper

from .made_records import latency_record

FLOAT = TensorProto.FLOAT


def save(path: Path, nodes: Sequence[Any], inputs: dict[str, Any], output: str, **weights: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("node", "inputs", "weights", "operations", "moved"),
    [
        # 2 · (2·8·6·6 outputs) · (4 channels · 3·3), weights 8·4·9, in 2·4·6·6, out 2·8·6·6 floats
        (
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
            {"x": (2, 4, 6, 6)},
            {"w": zeros(8, 4, 3, 3)},
            2 * 576 * 36,
            4 * (288 + 288 + 576),
        ),
        (
            helper.make_node("Conv", ["x", "w"], ["y"], group=4, strides=[2, 2]),
            {"x": (1, 4, 4, 4)},
            {"w": zeros(8, 1, 2, 2)},
            2 * 32 * 4,
            4 * (64 + 32 + 32),
        ),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            {"x": (1, 4, 3, 3)},
            {"w": zeros(4, 8, 2, 2)},
            2 * 36 * 32,
            4 * (36 + 128 + 288),
        ),
        (
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            {"x": (3, 5, 7)},
            {"w": zeros(7, 2)},
            2 * 30 * 7,
            4 * (105 + 14 + 30),
        ),
        (
            helper.make_node("Gemm", ["x", "w"], ["y"], transA=1),
            {"x": (7, 5)},
            {"w": zeros(7, 2)},
            2 * 10 * 7,
            4 * (35 + 14 + 10),
        ),
        # of the table only the looked-up rows move: 2 rows of 3 floats, twice (they are the output as well)
        (
            helper.make_node("Gather", ["w", "i"], ["y"]),
            {},
            {"w": zeros(100, 3), "i": np.array([1, 5])},
            0,
            2 * 8 + 24,
        ),
    ],
    ids=["conv", "grouped conv", "transposed conv", "matmul", "gemm", "lookup"],
)
def test_operations_and_bytes_by_hand(
    tmp_path: Path, node: Any, inputs: Any, weights: Any, operations: int, moved: int
) -> None:
    file = save(
        tmp_path / "g.onnx", [node], {name: ["a"] * len(shape) for name, shape in inputs.items()}, "y", **weights
    )
    assert count(file, inputs) == Cost(operations, moved)


@pytest.mark.parametrize("heads_apart", [False, True])
def test_attention_counts_both_products(tmp_path: Path, heads_apart: bool) -> None:
    heads, length, keys, size = 4, 10, 6, 8
    shape = (lambda n: (2, heads, n, size)) if heads_apart else (lambda n: (2, n, heads * size))
    attributes = {} if heads_apart else {"q_num_heads": heads, "kv_num_heads": heads}
    inputs = {"q": shape(length), "k": shape(keys), "v": shape(keys)}
    node = helper.make_node("Attention", list(inputs), ["y"], **attributes)
    file = save(tmp_path / "g.onnx", [node], {n: list(s) for n, s in inputs.items()}, "y")
    assert count(file, inputs).operations == 2 * 2 * (2 * heads * length * keys * size)


def test_sizes_that_the_graph_computes_are_followed(tmp_path: Path) -> None:
    nodes = [  # [B, C, H, W] to [B, H·W, C], the sizes taken from the input, as exported transformers do
        helper.make_node("Shape", ["x"], ["batch"], end=1),
        helper.make_node("Shape", ["x"], ["height"], start=2, end=3),
        helper.make_node("Shape", ["x"], ["width"], start=3),
        helper.make_node("Mul", ["height", "width"], ["cells"]),
        helper.make_node("Concat", ["batch", "cells", "channels"], ["shape"], axis=0),
        helper.make_node("GroupNormalization", ["x", "one", "one"], ["normal"], num_groups=2),
        helper.make_node("Transpose", ["normal"], ["turned"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["turned", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    weights = {"channels": np.array([4]), "one": np.ones(4, np.float32), "w": zeros(4, 16)}
    file = save(tmp_path / "g.onnx", nodes, {"x": ["b", 4, "h", "w"]}, "y", **weights)
    assert count(file, {"x": (2, 4, 5, 3)}).operations == 2 * (2 * 15 * 16) * 4


def test_a_shape_that_cannot_be_known_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=FLOAT)]
    nodes += [helper.make_node("MatMul", ["f", "w"], ["y"])]
    file = save(tmp_path / "g.onnx", nodes, {"x": ["a"]}, "y", w=zeros(3, 2))
    with pytest.raises(BundleError, match=r"g\.onnx: the shapes of MatMul"):
        count(file, {"x": (3,)})


def test_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Cost(100, 10).limit_seconds(flops=10, bandwidth=10) == 10
    assert Cost(10, 100).limit_seconds(flops=10, bandwidth=10) == 10


def test_an_exported_bundle_can_be_counted(tiny_sd15_bundle: Path) -> None:
    bundle = Bundle.open(tiny_sd15_bundle)
    size = {"height": 64, "width": 64}
    costs = [graph_cost(bundle, "denoiser", batch=batch, guidance=2.0, **size) for batch in (1, 2)]
    assert 1.9 * costs[0].operations < costs[1].operations <= 2 * costs[0].operations
    for name in ("text_encoder", "decoder"):
        assert graph_cost(bundle, name, batch=1, guidance=2.0, **size).operations > 0


def test_who_computes_in_bf16_is_held_against_that_limit() -> None:
    exact, other = latency_record(1), latency_record(2, contender="diffusers/eager-bf16", title="diffusers in bf16")
    ours = latency_record(3, contender="latentrt/openvino-bf16/step", title="latentrt (openvino, bf16, step)")
    table = tables.roofline_table([exact, ours, other])
    assert table.header[4:] == ["latentrt", "≈ latentrt (openvino, bf16, step)", "≈ diffusers in bf16"]
    assert table.rows[1][4:] == ["2 (50%)", "2", "2"] and "bf16" not in table.note
    for record in (exact, ours, other):
        record["ceiling"] |= {"flops_bf16": 3e11}
    table = tables.roofline_table([exact, ours, other])
    assert table.rows[1][4:] == ["2 (50%)"] * 3 and "100 GFLOP/s (300 in bf16)" in table.note
