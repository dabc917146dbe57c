"""`Attention` rewritten: against attention written out in numpy, and built by TensorRT-RTX without the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from latentrt.engines.attention import rewrite
from latentrt.engines.onnx_graph import load_graph
from onnx import TensorProto, helper, numpy_helper

ROWS, HEADS, QUERIES, KEYS, SIZE = 2, 3, 5, 7, 8
SEEN = np.tril(np.ones((QUERIES, KEYS), bool), 2)
CASES: dict[str, dict[str, Any]] = {
    "heads in the last axis": {"flat": True},
    "heads in the last axis, scaled": {"flat": True, "scale": 0.2},
    "heads of their own": {},
    "a mask to add": {"mask": np.where(SEEN, 0, -1e4).astype(np.float32)},
    "a mask of what is seen": {"mask": SEEN, "scale": 0.3, "is_causal": 0, "softcap": 0.0},
}


def model(flat: bool = False, mask: Any = None, kind: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    def value(name: str, length: int) -> onnx.ValueInfoProto:
        shape = ["R", length, HEADS * SIZE] if flat else ["R", HEADS, length, SIZE]
        return helper.make_tensor_value_info(name, kind, shape)

    values = [value("q", QUERIES), value("k", KEYS), value("v", KEYS)]
    if mask is not None:
        mask_kind = TensorProto.BOOL if mask.dtype == bool else kind
        values.append(helper.make_tensor_value_info("mask", mask_kind, [1, 1, QUERIES, KEYS]))
    if flat:
        attributes |= {"q_num_heads": HEADS, "kv_num_heads": attributes.get("kv_num_heads", HEADS)}
    node = helper.make_node("Attention", [v.name for v in values], ["y"], **attributes)
    graph = helper.make_graph([node], "attention", values, [value("y", QUERIES)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def feeds(flat: bool = False, mask: Any = None, **_: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {"q": QUERIES, "k": KEYS, "v": KEYS}
    made: dict[str, Any] = {
        name: random.standard_normal((ROWS, HEADS, length, SIZE), np.float32) for name, length in shapes.items()
    }
    if flat:
        made = {name: array.swapaxes(1, 2).reshape(ROWS, -1, HEADS * SIZE) for name, array in made.items()}
    return made | ({} if mask is None else {"mask": mask[None, None]})


def written_out(flat: bool = False, mask: Any = None, scale: float = SIZE**-0.5, **_: Any) -> Any:
    q, k, v = (feeds()[name].astype(np.float64) for name in "qkv")
    scores = scale * q @ k.swapaxes(2, 3)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return y.swapaxes(1, 2).reshape(ROWS, QUERIES, -1) if flat else y


def run(graph: onnx.ModelProto, values: dict[str, Any]) -> Any:
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, values)[0]


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_expanded_attention_is_attention(case: dict[str, Any]) -> None:
    graph = model(**case)
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    assert "Attention" not in operators(graph) and operators(graph).count("Softmax") == 1
    np.testing.assert_allclose(run(graph, feeds(**case)), written_out(**case), atol=2e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_attention_is_attention(case: dict[str, Any]) -> None:
    graph = model(**case)
    rewrite(graph, fuse=True)
    assert operators(graph) == ["MultiHeadAttention" if case.get("flat") else "Attention"]
    np.testing.assert_allclose(run(graph, feeds(**case)), written_out(**case), atol=2e-6)


def test_a_mask_may_be_a_constant_of_the_graph_and_halves_do_not_overflow() -> None:
    graph = model(mask=SEEN, kind=TensorProto.FLOAT16)
    graph.graph.initializer.append(numpy_helper.from_array(SEEN[None, None], "mask"))
    del graph.graph.input[3]
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    values = {name: array.astype(np.float16) for name, array in feeds().items()}
    values["q"] *= -100  # a score of some -200 beside the lowest half
    wanted = written_out(mask=SEEN, scale=-100 * SIZE**-0.5)
    np.testing.assert_allclose(run(graph, values), wanted, atol=2e-2)


def test_plain_and_masked_attention_in_one_graph_are_fused_and_expanded() -> None:
    graph = model(flat=True)
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["masked"], q_num_heads=HEADS, kv_num_heads=HEADS)
    graph.graph.node.append(node)
    graph.graph.input.append(model(flat=True, mask=SEEN).graph.input[3])
    graph.graph.output.append(helper.make_tensor_value_info("masked", TensorProto.FLOAT, ["R", QUERIES, HEADS * SIZE]))
    rewrite(graph, fuse=True, expand=True)
    kinds = operators(graph)
    assert kinds.count("MultiHeadAttention") == kinds.count("Softmax") == 1 and "Attention" not in kinds
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    plain, masked = session.run(None, feeds(flat=True, mask=SEEN))
    np.testing.assert_allclose(plain, written_out(flat=True), atol=2e-6)
    np.testing.assert_allclose(masked, written_out(flat=True, mask=SEEN), atol=2e-6)


@pytest.mark.parametrize(
    "attributes",
    [{"is_causal": 1}, {"softcap": 3.0}, {"flat": True, "kv_num_heads": 1}, {"softmax_precision": 1}],
    ids=str,
)
def test_a_form_that_is_not_covered_stays(attributes: dict[str, Any]) -> None:
    graph = model(**attributes)
    rewrite(graph, fuse=True, expand=True)
    assert operators(graph) == ["Attention"]


def test_a_library_that_does_not_know_the_operator_builds_the_models(
    tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from latentrt.engines.bundle import Bundle
    from latentrt.engines.tensorrt.builder import build_plan
    from latentrt.engines.tensorrt.library import load_library
    from latentrt.engines.tensorrt.plan import PlanOptions, profile_for
    from latentrt.runtime.shapes import requested_shapes

    library = load_library("tensorrt-rtx")
    bundle = Bundle.open(tiny_sd15_bundle)
    shapes = requested_shapes(bundle, 64, 64, 1)
    layers = {}
    for knows in (True, False):
        monkeypatch.setattr(library, "reads_attention", knows)
        for name in ("text_encoder", "denoiser"):
            file = bundle.file(bundle.graph(name).files[0])
            assert "Attention" in operators(load_graph(file, "cpu"))
            profile = profile_for(bundle.graph(name), shapes[name])
            facts = build_plan(library, file, tmp_path / "plan", profile, PlanOptions(), compute_capability="8.9")
            layers[name, knows] = facts["layers"]
    assert layers["denoiser", True] != layers["denoiser", False]
