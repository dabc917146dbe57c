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

HEADS, QUERIES, KEYS, SIZE = 6, 5, 7, 8
SEEN = np.tril(np.ones((QUERIES, KEYS), bool), 2)
PADDED = np.arange(KEYS) < np.array([KEYS, 4, 2])[:, None, None, None]
"""[R, 1, 1, L]: how much of the keys three prompts have."""
EACH = np.random.default_rng(5).random((3, 1, QUERIES, KEYS)) < 0.7
"""[R, 1, L, L]: other keys for each query."""
EACH[..., 0] = True
CASES: dict[str, dict[str, Any]] = {
    "heads in the last axis": {"flat": True},
    "heads in the last axis, scaled": {"flat": True, "scale": 0.2},
    "heads in the last axis, few of keys": {"flat": True, "kv_heads": 2},
    "heads of their own": {},
    "few heads of keys": {"kv_heads": 3, "scale": 0.3},
    "a head of keys, of a size that is not known": {"kv_heads": 1, "scale": 0.3, "size": "S"},
    "a mask to add": {"mask": np.where(SEEN, 0, -1e4).astype(np.float32)},
    "a mask to add, for each row": {"mask": np.where(EACH, 0.5, -1e4).astype(np.float32), "flat": True},
    "a mask of what is seen": {"mask": SEEN, "scale": 0.3, "is_causal": 0, "softcap": 0.0},
    "a mask of what each query sees": {"mask": EACH, "kv_heads": 2},
    "causal": {"is_causal": 1, "scale": 0.3, "size": "S"},
    "causal, heads in the last axis": {"is_causal": 1, "flat": True, "kv_heads": 2},
    "causal, and a mask of what is seen": {"is_causal": 1, "mask": EACH},
    "causal, and a mask to add": {"is_causal": 1, "mask": np.where(EACH, 0.5, -1e4).astype(np.float32)},
}
NARROW: dict[str, dict[str, Any]] = {
    "what is seen": {"mask": PADDED},
    "what is seen, heads in the last axis": {"mask": PADDED, "flat": True},
    "what is seen, few heads of keys": {"mask": PADDED, "kv_heads": 2, "size": "S", "scale": 0.3},
    "to add": {"mask": np.where(PADDED, 0.25, -1e4).astype(np.float32)},
    "to add, causal": {"mask": np.where(PADDED, 0.25, -1e4).astype(np.float32), "is_causal": 1},
    "of the last axis alone": {"mask": PADDED[2, 0], "flat": True},
}
"""Masks without an axis of queries, or with one of size 1, which ONNX Runtime refuses."""
HALF = TensorProto.FLOAT16


def model(
    flat: bool = False,
    mask: Any = None,
    kind: int = TensorProto.FLOAT,
    kv_heads: int = HEADS,
    size: int | str = SIZE,
    sizes: str = "known",
    **attributes: Any,
) -> onnx.ModelProto:
    """Return a graph of one node; of `sizes` that are "free" every row, length and query axis of a mask is a symbol."""
    free = sizes == "free"

    def value(name: str, length: int, heads: int) -> onnx.ValueInfoProto:
        length_ = f"L{name}" if free else length
        shape = ["R", length_, heads * SIZE] if flat else ["R", heads, length_, size]
        return helper.make_tensor_value_info(name, kind, shape)

    values = [value("q", QUERIES, HEADS), value("k", KEYS, kv_heads), value("v", KEYS, kv_heads)]
    if mask is not None:
        mask_kind = TensorProto.BOOL if mask.dtype == bool else kind
        shape = [f"M{axis}" for axis in range(mask.ndim)] if free else list(mask.shape)
        values.append(helper.make_tensor_value_info("mask", mask_kind, shape))
    if flat:
        attributes |= {"q_num_heads": HEADS, "kv_num_heads": kv_heads}
    node = helper.make_node("Attention", [v.name for v in values], ["y"], **attributes)
    graph = helper.make_graph([node], "attention", values, [value("y", QUERIES, HEADS)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def feeds(flat: bool = False, mask: Any = None, kv_heads: int = HEADS, rows: int = 3, **_: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {"q": (HEADS, QUERIES), "k": (kv_heads, KEYS), "v": (kv_heads, KEYS)}
    made: dict[str, Any] = {
        name: random.standard_normal((rows, *shape, SIZE), np.float32) for name, shape in shapes.items()
    }
    if flat:
        made = {name: array.swapaxes(1, 2).reshape(rows, array.shape[2], -1) for name, array in made.items()}
    return made | ({} if mask is None else {"mask": mask[:rows] if mask.ndim == 4 else mask})


def written_out(flat: bool = False, scale: float = SIZE**-0.5, is_causal: int = 0, rows: int = 3, **case: Any) -> Any:
    values = feeds(rows=rows, **case)
    q, k, v = (values[name].astype(np.float64) for name in "qkv")
    k, v = (np.repeat(each, HEADS // each.shape[1], axis=1) for each in (k, v))
    scores, mask = scale * q @ k.swapaxes(2, 3), values.get("mask", np.float32(0))
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if is_causal:
        scores = np.where(np.tril(np.ones((QUERIES, KEYS), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return y.swapaxes(1, 2).reshape(rows, QUERIES, -1) if flat else y


def in_half(values: dict[str, Any]) -> dict[str, Any]:
    return {name: array if array.dtype == bool else array.astype(np.float16) for name, array in values.items()}


def run(graph: onnx.ModelProto, values: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, values)[0]


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("sizes", ["known", "free"])
@pytest.mark.parametrize("case", [*CASES.values(), *NARROW.values()], ids=[*CASES, *(f"narrow, {n}" for n in NARROW)])
def test_expanded_attention_is_attention(case: dict[str, Any], sizes: str) -> None:
    graph = model(**case, sizes=sizes)
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    assert "Attention" not in operators(graph) and operators(graph).count("Softmax") == 1
    np.testing.assert_allclose(run(graph, feeds(**case)), written_out(**case), atol=2e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_attention_is_attention(case: dict[str, Any]) -> None:
    graph = model(**case)
    rewrite(graph, fuse=True)
    plain = case.get("flat") and not {"kv_heads", "mask", "is_causal"} & set(case)
    assert operators(graph) == ["MultiHeadAttention" if plain else "Attention"]
    np.testing.assert_allclose(run(graph, feeds(**case)), written_out(**case), atol=2e-6)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW)
def test_a_mask_for_all_queries_alike_is_repeated_for_each(case: dict[str, Any], rows: int, kind: int) -> None:
    values = feeds(**case, rows=rows)
    for sizes in ("known", "free"):
        graph = model(**case, kind=kind, sizes=sizes)
        if sizes == "known" and case["mask"].ndim == 4:
            graph.graph.input[3].type.tensor_type.shape.dim[0].dim_param = "R"
        rewrite(graph, fuse=True)
        onnx.checker.check_model(graph, full_check=True)
        assert operators(graph) == ["Shape", "Constant", "Concat", "Expand", "Attention"]
        got = run(graph, in_half(values) if kind == HALF else values)
        np.testing.assert_allclose(got, written_out(**case, rows=rows), atol=4e-3 if kind == HALF else 2e-6)


def test_a_mask_with_an_axis_of_queries_is_left_as_it_is() -> None:
    graph = model(mask=EACH, sizes="free")
    graph.graph.input[3].type.tensor_type.shape.dim[2].dim_param = "Lq"
    for each in (graph, model(mask=SEEN), model(mask=EACH)):
        rewrite(each, fuse=True)
        assert operators(each) == ["Attention"]


@pytest.mark.parametrize("case", [case for case in CASES.values() if "mask" in case], ids=str)
def test_masked_halves_are_expanded_without_overflow(case: dict[str, Any]) -> None:
    graph = model(**case, kind=HALF)
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(run(graph, in_half(feeds(**case))), written_out(**case), atol=4e-3)


def test_a_mask_of_another_type_than_the_scores_is_converted() -> None:
    graph = model(mask=np.where(SEEN, 0, -1e4).astype(np.float16), kind=HALF)
    graph.graph.input[3].type.tensor_type.elem_type = TensorProto.FLOAT
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    values = in_half(feeds()) | {"mask": np.where(SEEN, 0, -3e38).astype(np.float32)}
    np.testing.assert_allclose(run(graph, values), written_out(mask=SEEN), atol=4e-3)


def test_what_is_both_causal_and_masked_can_be_expanded_alone() -> None:
    for name, case in CASES.items():
        graph = model(**case)
        rewrite(graph, expand_masked_causal=True)
        assert ("Attention" in operators(graph)) == (not name.startswith("causal, and"))


def test_bfloat16_is_expanded_in_its_own_type() -> None:
    graph = model(mask=SEEN, kind=TensorProto.BFLOAT16, is_causal=1, kv_heads=2)
    rewrite(graph, expand=True)
    onnx.checker.check_model(graph, full_check=True)
    assert "Attention" not in operators(graph)
    graph = model(flat=True, kind=TensorProto.BFLOAT16)
    rewrite(graph, fuse=True)  # there is no such kernel of MultiHeadAttention
    assert operators(graph) == ["Attention"]
    rewrite(graph, fuse=True, expand=True)
    assert operators(graph).count("Softmax") == 1


def test_a_mask_may_be_a_constant_of_the_graph_and_halves_do_not_overflow() -> None:
    for mask in (SEEN, SEEN[None, None]):
        graph = model(mask=mask, kind=HALF)
        graph.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
        del graph.graph.input[3]
        rewrite(graph, expand=True)
        onnx.checker.check_model(graph, full_check=True)
        values = in_half(feeds())
        values["q"] *= -100  # a score of some -200 beside the lowest half
        wanted = written_out(mask=SEEN, scale=-100 * SIZE**-0.5)
        np.testing.assert_allclose(run(graph, values), wanted, atol=6e-2)


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
    "form",
    [
        {"softcap": 3.0},
        {"softmax_precision": 1},
        {"size": "S"},  # without a scale
        {"kv_heads": 4, "scale": 1.0},
        {"flat": True, "kv_heads": 4},
    ],
    ids=str,
)
def test_a_form_that_is_not_covered_stays(form: dict[str, Any]) -> None:
    graph = model(**form)
    rewrite(graph, fuse=True, expand=True)
    assert operators(graph) == ["Attention"]


@pytest.mark.parametrize("input", [0, 1, 2])
def test_heads_that_are_not_known_are_not_guessed(input: int) -> None:
    graph = model(scale=0.3)
    graph.graph.input[input].type.tensor_type.shape.dim[1].dim_param = "N"
    rewrite(graph, fuse=True, expand=True)
    assert operators(graph) == ["Attention"]


@pytest.mark.parametrize("knows", [True, False])
def test_tensorrt_reads_every_form_whether_it_knows_the_operator_or_not(
    knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from latentrt.engines.tensorrt.builder import _parse
    from latentrt.engines.tensorrt.library import load_library

    library = load_library("tensorrt-rtx")
    monkeypatch.setattr(library, "reads_attention", knows)
    for kind in (HALF, TensorProto.BFLOAT16):
        for case in (*CASES.values(), *NARROW.values()):
            onnx.save(model(**case | {"size": SIZE}, kind=kind, sizes="free"), tmp_path / "graph.onnx")
            _parse(library, library.trt.Builder(library.logger), tmp_path / "graph.onnx")


@pytest.mark.long
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
