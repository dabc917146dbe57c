"""A graph that runs piece by piece gives what it gives as a whole."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from latentrt.export import pieces
from onnx import TensorProto, helper, numpy_helper

WEIGHT = 8 * 8 * 4
"""Bytes of one matrix of the graph."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A graph of five products, of which the last ones read what the first ones made, with weights beside it."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((8, 8), np.float32), f"w{n}") for n in range(5)]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["a"]), helper.make_node("Shape", ["a"], ["shape"])]
    nodes += [helper.make_node("MatMul", ["a", "w1"], ["b"]), helper.make_node("MatMul", ["b", "w2"], ["c"])]
    nodes += [helper.make_node("Add", ["a", "c"], ["d"]), helper.make_node("MatMul", ["d", "w3"], ["e"])]
    nodes += [helper.make_node("MatMul", ["e", "w4"], ["f"]), helper.make_node("Reshape", ["f", "shape"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("x", "a", "y")]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(("most", "count"), [(1 << 30, 1), (2 * WEIGHT, 3), (WEIGHT, 5), (1, 5)])
def test_pieces_give_what_the_whole_gives(file: Path, most: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    ordinary = pieces._session

    def session(model: bytes, folder: Path) -> Any:
        opened.append(len(onnx.load_from_string(model).graph.initializer))
        return ordinary(model, folder)

    monkeypatch.setattr(pieces, "_session", session)
    cases = [{"x": np.random.default_rng(rows).standard_normal((rows, 8), np.float32)} for rows in (1, 3)]
    found = pieces.run_in_pieces(file, cases, most=most)
    whole = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for case, outputs in zip(cases, found, strict=True):
        for output, expected in zip(outputs, whole.run(None, case), strict=True):
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert len(opened) == count and sum(opened) == 5 and max(opened) <= max(1, most // WEIGHT)


def test_what_branches_read_is_kept(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.full((8, 8), n, np.float32), f"w{n}") for n in range(3)]
    weights.append(numpy_helper.from_array(np.array(True), "yes"))
    out = [helper.make_tensor_value_info("inside", TensorProto.FLOAT, ["N", 8])]
    then, other = (
        helper.make_graph([helper.make_node("MatMul", [value, "w2"], ["inside"])], "branch", [], out)
        for value in ("a", "b")
    )
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("MatMul", ["a", "w0"], ["b"])]
    nodes.append(helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in "xy")
    graph = helper.make_graph(nodes, "branches", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    ((found,),) = pieces.run_in_pieces(tmp_path / "m.onnx", [{"x": np.eye(2, 8, dtype=np.float32)}], most=1)
    np.testing.assert_array_equal(found, np.full((2, 8), 16.0))


MEASURE = """
import sys
from contextlib import nullcontext
import numpy as np
from latentrt.export.pieces import memory_given_back

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def kept():
    np.ones((1 << 22) - 4096)  # what the allocator learns from
    before, blocks, between = held(), [], []
    for _ in range(40):
        blocks.append(np.ones(1 << 19))
        between.append(np.ones(1 << 13))
    blocks.clear()
    return held() - before

if sys.argv[1] == "behind":
    with memory_given_back():
        pass
with memory_given_back() if sys.argv[1] == "with" else nullcontext():
    print(kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep blocks in their own ways")
def test_blocks_that_are_free_go_back_to_the_system() -> None:
    kept = {}
    for how in ("with", "without", "behind"):
        command = [sys.executable, "-c", MEASURE, how]
        kept[how] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kept["with"] < 20_000 < 100_000 < min(kept["without"], kept["behind"])  # KiB, of 160 MiB
