"""Graphs declared in an older opset compute the same: the operators that they use were only given more types since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.attention import rewrite
from latentrt.engines.bundle import Bundle
from latentrt.engines.engine import shape_of, solve_sizes
from latentrt.engines.errors import EngineError
from latentrt.engines.opset import lower_opset
from latentrt.engines.tensorrt.library import OLD_OPSET
from latentrt.export.embedded import BUNDLE
from latentrt.runtime.shapes import requested_shapes

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "decoder", "image_encoder"])
def test_a_graph_means_the_same(name: str) -> None:
    bundle = Bundle.open(BUNDLE)
    graph = bundle.graph(name)
    model = onnx.load(bundle.file(graph.files[0]))
    rewrite(model, expand=True)
    shapes = requested_shapes(bundle, 64, 64, 1)[name]
    sizes = solve_sizes({t.name: t for t in graph.inputs}, shapes)
    random = np.random.default_rng(0)
    feeds = {t.name: random.uniform(0, 1.9, shape_of(t, sizes)).astype(t.dtype) for t in graph.inputs}
    before = outputs(model, feeds)
    lower_opset(model, OLD_OPSET)
    assert [entry.version for entry in model.opset_import] == [OLD_OPSET] and model.ir_version <= 9
    onnx.checker.check_model(model, full_check=True)
    for here, there in zip(before, outputs(model, feeds), strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("RMSNormalization", ["x", "w"]), ("GroupNormalization", ["x", "w", "w"])],
)
def test_an_operator_of_another_meaning_or_none_is_named(kind: str, inputs: list[str]) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(kind, inputs, ["y"], **({"num_groups": 2} if kind.startswith("Group") else {}))
    tensors = [value("x", onnx.TensorProto.FLOAT, [1, 4, 2, 2]), value("w", onnx.TensorProto.FLOAT, [4])]
    graph = onnx.helper.make_graph([node], "g", tensors, [value("y", onnx.TensorProto.FLOAT, [1, 4, 2, 2])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    with pytest.raises(EngineError, match=f"operator {kind} of opset 23 has no equal in opset 20"):
        lower_opset(model, 20)


def test_a_graph_that_is_old_enough_stays_as_it_is(tmp_path: Path) -> None:
    model = onnx.load(Path(BUNDLE) / "step.onnx")
    before = model.SerializeToString()
    lower_opset(model, 20)
    assert model.SerializeToString() == before
