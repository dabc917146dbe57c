"""A denoiser taken apart: the parts give what the whole gives, and hold what is worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from latentrt.export.passes.hoist import Parts, hoist  # noqa: E402

WIDTH, TEXT, ROWS, TOKENS, TIMES = 64, 48, 3, 5, 4
RANDOM = np.random.default_rng(0)
Arrays = dict[str, NDArray[Any]]


def weight(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32) / 8, name)


def denoiser(nodes: Sequence[tuple[str, Sequence[str], str] | tuple[str, Sequence[str], str, dict[str, Any]]]) -> Any:
    """Return a model of latents, timesteps, texts and whole texts from (operator, inputs, output, attributes)."""
    shapes = {"time": (1, WIDTH), "scale": (WIDTH, WIDTH), "bias": (WIDTH,), "whole": (8, WIDTH)}
    shapes |= {"key": (TEXT, WIDTH), "value": (TEXT, WIDTH), "query": (WIDTH, WIDTH)}
    weights = [*(weight(name, *shape) for name, shape in shapes.items()), numpy_helper.from_array(np.array([1]), "one")]
    types = {"model_input": ["R", "h", WIDTH], "timestep": ["R"], "context": ["R", "L", TEXT], "pooled": ["R", 8]}
    made = [
        helper.make_node(kind, list(inputs), [output], **(more[0] if more else {}))
        for kind, inputs, output, *more in nodes
    ]
    read = {name for node in made for name in node.input}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in types.items() if n in read]
    outputs = [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["R", "h", WIDTH])]
    graph = helper.make_graph(made, "denoiser", inputs, outputs, [w for w in weights if w.name in read])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


TIME = (
    ("Unsqueeze", ["timestep", "one"], "column"),
    ("MatMul", ["column", "time"], "linear"),
    ("Tanh", ["linear"], "embedded"),
)
SCALED = (
    ("Gemm", ["embedded", "scale", "bias"], "scales"),
    ("Unsqueeze", ["scales", "one"], "moment"),
    ("Mul", ["model_input", "moment"], "scaled"),
)
ATTENDED = (
    ("MatMul", ["context", "key"], "keys"),
    ("Add", ["keys", "bias"], "biased"),
    ("MatMul", ["context", "value"], "values"),
    ("Transpose", ["biased"], "turned", {"perm": [0, 2, 1]}),
    ("MatMul", ["scaled", "turned"], "scores"),
    ("Softmax", ["scores"], "shares"),
    ("MatMul", ["shares", "values"], "prediction"),
)


def run(model: Any, inputs: Arrays) -> Arrays:
    """Run a model of either library on those of its inputs that it reads."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: inputs[v.name] for v in session.get_inputs()}), strict=True))


def inputs() -> Arrays:
    shapes = {"model_input": (ROWS, 7, WIDTH), "context": (ROWS, TOKENS, TEXT), "pooled": (ROWS, 8)}
    found: Arrays = {name: RANDOM.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"row_timesteps": RANDOM.random((ROWS, TIMES)).astype(np.float32)}


def taken_apart(nodes: Any, tokens: int = TOKENS, steps: int = 28) -> Parts:
    """Take a model apart after checking, at every step, that its parts give what it gives."""
    whole = denoiser(nodes)
    parts = hoist(ir.from_proto(whole), {"L": tokens}, steps)
    given = inputs()
    kept = dict(given)
    for part in (parts.prompt, parts.schedule):
        kept |= {} if part is None else run(part, kept)
    for step in range(TIMES):
        timestep = {"timestep": given["row_timesteps"][:, step].copy()}
        now = {"modulation": kept["modulations"][:, step].copy()} if "modulations" in kept else {}
        found = run(parts.denoiser, {**kept, **timestep, **now})["prediction"]
        np.testing.assert_allclose(found, run(whole, {**given, **timestep})["prediction"], rtol=0, atol=1e-6)
    return parts


def names(model: Any) -> list[str]:
    return [value.name for value in model.graph.inputs]


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


def test_keys_values_and_scales_leave_the_loop() -> None:
    parts = taken_apart((*TIME, *SCALED, *ATTENDED))
    assert names(parts.denoiser) == ["model_input", "prompt_0", "prompt_1", "modulation"]
    assert names(parts.prompt) == ["context"] and names(parts.schedule) == ["row_timesteps"]
    assert [str(value.shape) for value in parts.schedule.graph.outputs] == [f"[R,T,{WIDTH}]"]  # type: ignore[union-attr]
    assert kinds(parts.prompt).count("Add") == 1  # the bias goes with its product, and what turns it as well
    assert set(kinds(parts.denoiser)) <= {"Reshape", "Mul", "MatMul", "Softmax", "Transpose"}
    assert kinds(parts.denoiser).count("MatMul") == 2
    assert not {"key", "value", "scale", "time"} & set(parts.denoiser.graph.initializers)


def test_what_depends_on_timestep_and_prompt_is_kept_for_every_row_and_step() -> None:
    both = (
        ("MatMul", ["pooled", "whole"], "of_text"),
        ("Add", ["linear", "of_text"], "sum"),
        ("Tanh", ["sum"], "embedded"),
    )
    parts = taken_apart((*TIME[:2], *both, *SCALED, ("Identity", ["scaled"], "prediction")))
    assert names(parts.schedule) == ["row_timesteps", "pooled"] and parts.prompt is None
    assert names(parts.denoiser) == ["model_input", "modulation"]


def test_products_with_fewer_weights_than_what_is_kept_stay() -> None:
    nodes = (*TIME, *SCALED, *ATTENDED)
    assert taken_apart(nodes, tokens=TEXT + 1).prompt is None
    assert taken_apart(nodes, tokens=TEXT).prompt is not None
    few = taken_apart(nodes, steps=WIDTH + 2)  # weights and a bias
    assert few.schedule is None and "timestep" in names(few.denoiser)


def test_texts_are_not_kept_for_every_step() -> None:
    mixed = (
        ("Unsqueeze", ["embedded", "one"], "for_tokens"),
        ("MatMul", ["context", "key"], "keys"),
        ("Mul", ["keys", "for_tokens"], "moved"),
        ("MatMul", ["moved", "query"], "asked"),
        ("ReduceMean", ["asked", "one"], "mean"),
        ("Mul", ["model_input", "mean"], "prediction"),
    )
    parts = taken_apart((*TIME, *mixed), steps=1)
    assert names(parts.schedule) == ["row_timesteps"] and names(parts.prompt) == ["context"]
    assert "query" in parts.denoiser.graph.initializers


def test_sizes_are_taken_from_what_is_read_anyway() -> None:
    sized = (
        ("Shape", ["context"], "rows", {"start": 0, "end": 1}),
        ("Shape", ["context"], "tokens", {"start": 1, "end": 2}),
        ("Concat", ["rows", "tokens"], "sizes", {"axis": 0}),
        ("ReduceSum", ["sizes"], "number", {"keepdims": 0}),
        ("Cast", ["number"], "float", {"to": TensorProto.FLOAT}),
        ("Mul", ["model_input", "float"], "scaled"),
    )
    assert names(taken_apart((*sized, *ATTENDED)).denoiser) == ["model_input", "prompt_0", "prompt_1"]


def test_bfloat16_is_float32_between_the_parts() -> None:
    """There are no kernels for bfloat16 here: the types alone are checked."""
    from onnx import checker

    model = denoiser((*TIME, *SCALED, *ATTENDED))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = ir.tensor(numpy_helper.to_array(tensor)).numpy().astype(ir.DataType.BFLOAT16.numpy())
            tensor.CopyFrom(ir.to_proto(ir.tensor(half, dtype=ir.DataType.BFLOAT16, name=tensor.name)))
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT
    cast = helper.make_node("Cast", ["timestep"], ["inside"], to=TensorProto.BFLOAT16)
    model.graph.node.insert(0, cast)
    model.graph.node[1].input[0] = "inside"
    parts = hoist(ir.from_proto(model), {"L": TOKENS})
    kept = {"prompt_0", "prompt_1", "modulations", "modulation"}
    for part in (parts.prompt, parts.schedule, parts.denoiser):
        assert part is not None
        checker.check_model(ir.to_proto(part), full_check=True)
        border = {value.name: value.dtype.name for value in (*part.graph.inputs, *part.graph.outputs)}
        assert {border[name] for name in kept & border.keys()} == {"FLOAT"}


def test_sizes_stay_in_the_file_of_a_graph_whose_weights_lie_beside_it(tmp_path: Path) -> None:
    """ONNX Runtime cannot read them from elsewhere; saved apart are tensors from 256 bytes on."""
    nodes: list[Any] = list(TIME)
    for number in range(40):
        nodes += [
            ("Gemm", ["embedded", "scale", "bias"], f"scales{number}"),
            ("Unsqueeze", [f"scales{number}", "one"], f"moment{number}"),
            ("Mul", [f"scaled{number - 1}" if number else "model_input", f"moment{number}"], f"scaled{number}"),
        ]
    parts = hoist(ir.from_proto(denoiser([*nodes, ("MatMul", ["scaled39", "query"], "prediction")])), {})
    ir.save(parts.denoiser, tmp_path / "denoiser.onnx", external_data="denoiser.onnx.data")
    session = ort.InferenceSession(str(tmp_path / "denoiser.onnx"), providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()][1] == ["R", 40 * WIDTH]
