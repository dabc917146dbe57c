"""Denoisers in 8 bits: layers and their marks, the sweep, the recorder, and whole bundles with a stub.

`eight_bits.py` stands in for Model Optimizer: ONNX Runtime's own quantization, which marks graphs in the same way.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from latentrt.engines.backends import open_backend  # noqa: E402
from latentrt.engines.bundle import Bundle, write_manifest  # noqa: E402
from latentrt.engines.device import Array  # noqa: E402
from latentrt.engines.errors import EngineError, ExportError, RequestError, StorageError  # noqa: E402
from latentrt.engines.progress import silent  # noqa: E402
from latentrt.engines.tensorrt.planner import Planner  # noqa: E402
from latentrt.export.embedded import BUNDLE, CHECKPOINT  # noqa: E402
from latentrt.export.quantize import environment, quantize_bundle, work  # noqa: E402
from latentrt.export.quantize.layers import (  # noqa: E402
    Layer,
    borders,
    fold,
    layers_of,
    name_nodes,
    named,
    without,
)
from latentrt.export.quantize.record import record  # noqa: E402
from latentrt.export.quantize.sweep import sensitive  # noqa: E402
from latentrt.runtime import Pipeline  # noqa: E402
from latentrt.runtime.cli import run  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

STUB = Path(__file__).parent / "eight_bits.py"
PROMPTS = ["a red circle on a blue background", "a green square on a white background"]
SHORT: dict[str, Any] = {"precision": "int8", "prompts": PROMPTS, "steps": 1, "threads": 1}
IMPORTS = '[ "$1" = -c ] && exit'


def program(folder: Path, *lines: str, imports: str = IMPORTS) -> Path:
    """Return a program of the shell, which imports whatever it is asked for."""
    path = folder / "stub"
    path.write_text("\n".join(["#!/bin/sh", imports, *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def optimizer(tmp_path: Path) -> Path:
    return program(tmp_path, f'exec "{sys.executable}" "{STUB}" "$@"')


# A network of five layers: a and b read the inputs, c and d are inside, e gives the output.


def small() -> Any:
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "net.a.weight"], ["a"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["t", "net.b.weight.T"], ["b"], name="b"),
        helper.make_node("Reshape", ["b", "shape"], ["b4"]),
        helper.make_node("Add", ["a", "b4"], ["ab"]),
        helper.make_node("Relu", ["ab"], ["r"]),
        helper.make_node("Conv", ["r", "net.c.0.weight"], ["c"], name="c"),
        helper.make_node("Conv", ["c", "net.c.1.weight"], ["d"], name="d"),
        helper.make_node("Add", ["r", "d"], ["rd"]),
        helper.make_node("Conv", ["rd", "net.e.weight"], ["prediction"], name="e"),
    ]
    shapes = {"a": (8, 4, 3, 3), "b": (3, 8), "c.0": (8, 8, 1, 1), "c.1": (8, 8, 1, 1), "e": (4, 8, 1, 1)}
    weights = [
        numpy_helper.from_array(
            draw.standard_normal(shape).astype(np.float32), f"net.{name}.weight{'.T' if name == 'b' else ''}"
        )
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", 4, 6, 6]),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, ["R", 3]),
        ],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["R", 4, 6, 6])],
        [*weights, numpy_helper.from_array(np.array([-1, 8, 1, 1]), "shape")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def with_marks(model: Any, kind: int, nodes: Sequence[str]) -> Any:
    """Mark the weights and inputs of nodes with scales that are far from the best."""
    graph, before = model.graph, []
    for node in graph.node:
        if node.name and node.name in nodes:
            for place, (name, scale) in enumerate(zip(node.input[:2], (0.05, 0.02), strict=True)):
                here = f"{node.name}{place}"
                weight = next((t for t in graph.initializer if t.name == name), None)
                axis = 0 if weight is None or node.op_type == "Conv" else 1
                channels = 0 if weight is None else weight.dims[axis]
                values = (
                    np.float32(scale) if not channels else np.linspace(scale, 2 * scale, channels, dtype=np.float32)
                )
                graph.initializer.append(numpy_helper.from_array(np.asarray(values), f"{here}.scale"))
                graph.initializer.append(
                    helper.make_tensor(
                        f"{here}.zero", kind, [channels] if channels else [], bytes(max(channels, 1)), raw=True
                    )
                )
                extra = [f"{here}.scale", f"{here}.zero"]
                before.append(helper.make_node("QuantizeLinear", [name, *extra], [f"{here}.q"], axis=axis))
                before.append(helper.make_node("DequantizeLinear", [f"{here}.q", *extra], [f"{here}.dq"], axis=axis))
                node.input[place] = f"{here}.dq"
        before.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in before]
    del graph.node[:]
    graph.node.extend(copied)
    return model


def outputs(model: Any) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    draw = np.random.default_rng(1)
    inputs = {
        "x": draw.standard_normal((2, 4, 6, 6)).astype(np.float32),
        "t": draw.standard_normal((2, 3)).astype(np.float32),
    }
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def test_layers_are_known_by_their_modules_and_first_and_last_are_found() -> None:
    graph = small().graph
    layers = layers_of(graph)
    assert [layer.name for layer in layers] == ["a", "b", "c.0", "c.1", "e"]
    assert {layer.name for layer in borders(graph, layers)} == {"a", "b", "e"}
    assert {layer.name for layer in named(layers, ["c.*", "e"])} == {"c.0", "c.1", "e"}


def test_a_pattern_of_no_layer_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--keep 'up_\*' is no layer of this denoiser: its layers are a, …, e"):
        named(layers_of(small().graph), ["a", "up_*"])


def test_every_node_gets_a_name_of_its_own() -> None:
    graph = small().graph
    graph.node[6].name = "c"
    name_nodes(graph)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names) and "" not in names and names[0] == "a"


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN], ids=["int8", "fp8"])
def test_marks_can_be_taken_away_and_weights_stored(kind: int, tmp_path: Path) -> None:
    plain = outputs(small())
    model = with_marks(small(), kind, "bcd")
    assert not np.array_equal(outputs(model), plain)
    np.testing.assert_array_equal(outputs(without(model, set("bcd"))), plain)
    only_c = outputs(with_marks(small(), kind, "c"))
    np.testing.assert_array_equal(outputs(without(model, set("bd"))), only_c)

    before = outputs(model)
    fold(model, tmp_path)
    np.testing.assert_array_equal(outputs(model), before)  # as ONNX Runtime's QuantizeLinear has it
    kept = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert "net.c.0.weight" not in kept and kept["net.c.0.weight.8"] == kind and kept["net.a.weight"] == 1
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 3


LAYERS = [Layer(str(number), f"blocks.{number}") for number in range(100)]


def additive(squares: dict[str, float]) -> tuple[Any, list[int]]:
    tries: list[int] = []

    def error(group: Sequence[Layer]) -> float:
        tries.append(len(group))
        return float(np.sqrt(sum(squares.get(layer.node, 1.0) for layer in group)))

    return error, tries


def test_the_sweep_finds_planted_layers_in_few_tries() -> None:
    error, tries = additive({"17": 300.0, "64": 200.0})
    assert [layer.node for layer in sensitive(LAYERS, error, 32)] == ["17", "64"]
    assert len(tries) <= 32


def test_the_sweep_keeps_nothing_of_a_network_whose_layers_are_alike() -> None:
    error, _ = additive({})
    assert sensitive(LAYERS, error, 32) == []
    assert sensitive([], error, 32) == []


@pytest.mark.parametrize("allowed", [0, 2, 5])
def test_the_sweep_measures_as_often_as_it_may(allowed: int) -> None:
    error, tries = additive({"17": 300.0})
    assert sensitive(LAYERS, error, allowed) == [] and len(tries) == (allowed if allowed > 2 else 0)


def test_the_sweep_keeps_few_layers_and_ends_where_there_are_few() -> None:
    error, tries = additive({str(number): 1e4 for number in range(3)})
    assert len(sensitive(LAYERS[:16], error, 32)) == 2  # an eighth of them
    assert len(tries) == 31  # all, and both halves of fifteen groups


@pytest.fixture(scope="module")
def backend() -> Any:
    return open_backend("onnxruntime-cpu", threads=1)


def test_the_recorder_keeps_what_the_denoiser_got_and_gave(backend: Any) -> None:
    bundle = Bundle.open(BUNDLE)
    found = record(bundle, backend, PROMPTS, steps=5, calls=2, seed=3, progress=silent)
    session = ort.InferenceSession(bundle.path / "denoiser.onnx", providers=["CPUExecutionProvider"])
    timesteps = []
    for recording in found:
        for call in recording.calls:
            inputs = {spec.name: call[spec.name] for spec in session.get_inputs()}
            np.testing.assert_allclose(session.run(None, inputs)[0], call["prediction"], rtol=0, atol=1e-4)
            assert len(call["model_input"]) == 2  # with and without the prompt
            timesteps.append(float(call["timestep"][0]))
    assert len(set(timesteps)) == 4  # other steps in each run
    with Pipeline(bundle, backend) as pipe:
        for number, recording in enumerate(found):
            image = pipe(PROMPTS[number], num_inference_steps=5, seed=3 + number).images[0]
            np.testing.assert_array_equal(np.asarray(image), recording.picture)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    stub = program(folder, f'exec "{sys.executable}" "{STUB}" "$@"')
    given: dict[str, Any] = {**SHORT, "steps": 4, "tries": 5, "keep": ["mid_block.*"]}
    return quantize_bundle(BUNDLE, folder / "int8", **given, python=stub)


def test_the_bundle_says_what_it_lost(quantized: Path) -> None:
    before, after = Bundle.open(BUNDLE), Bundle.open(quantized)
    assert after.problems() == {}
    info = after.graph("denoiser").quantization
    assert info is not None and info.precision == "int8" and info.tool == "nvidia-modelopt 0.0"
    assert info.samples == 4  # of the first prompt: the other one measures
    layers = layers_of(onnx.load(before.path / "denoiser.onnx", load_external_data=False).graph)
    assert info.layers + len(info.kept) == len(layers)
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(info.kept)
    assert sum(name.startswith("mid_block.") for name in info.kept) == sum(
        layer.name.startswith("mid_block.") for layer in layers
    )
    assert 1e-3 < info.relative_error < 0.1
    images = []
    for bundle in (before, after):
        with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
            images.append(np.asarray(pipe(PROMPTS[1], num_inference_steps=4, seed=1).images[0], np.float64))
    assert info.psnr == pytest.approx(10 * np.log10(255**2 / np.mean((images[0] - images[1]) ** 2)))
    others = {name for name in before.manifest.files if not name.startswith("denoiser")}
    assert {name: after.manifest.files[name] for name in others} == {
        name: before.manifest.files[name] for name in others
    }
    assert after.manifest.files["denoiser.onnx"].size < 0.5 * before.manifest.files["denoiser.onnx"].size
    assert sorted(path.name for path in quantized.iterdir()) == sorted([*after.manifest.files, "manifest.json"])


def test_inspect_shows_it(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(quantized)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "int8 in" in line]
    assert "by nvidia-modelopt 0.0 on 4 samples: error" in line and "conv_in" in line


@pytest.mark.long
def test_it_runs_on_openvino(quantized: Path) -> None:
    pytest.importorskip("openvino")
    images = []
    for backend in ("onnxruntime-cpu", "openvino"):
        with Pipeline.open(quantized, backend, threads=1) as pipe:
            images.append(np.asarray(pipe(PROMPTS[1], num_inference_steps=4, seed=1).images[0], np.float64))
    assert np.mean((images[0] - images[1]) ** 2) < 255**2 / 10**2.5  # 25 dB
    assert run(["verify", str(quantized), "--backend", "openvino", "--steps", "2", "--threads", "1"]) == 0


def test_verify_compares_it_with_the_bundle_before_either_way(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--steps", "2", "--threads", "1", "--backend", "onnxruntime-cpu"]
    for bundle, against in ((quantized, BUNDLE), (BUNDLE, quantized)):
        assert run(["verify", str(bundle), "--against", str(against), *common]) == 0
        said = capsys.readouterr().out
        line = next(line for line in said.splitlines() if line.startswith("denoiser.prediction"))
        assert float(line.split()[2]) > 1e-3 and "(bound 15)" in said
        assert ("denoiser=int8" in said) == (bundle == quantized)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_verify_compares_it_by_bounds_of_its_own(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert run(["verify", str(quantized), "--against", str(CHECKPOINT), "--steps", "4", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "(fp32) on onnxruntime-cpu, denoiser=int8 against PyTorch fp32" in said and "(bound 15)" in said


def test_gpus_without_fp8_are_refused_by_name(quantized: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(quantized)
    graph = bundle.graph("denoiser")
    assert graph.quantization is not None
    fp8 = graph.model_copy(update={"quantization": graph.quantization.model_copy(update={"precision": "fp8"})})
    shapes = {"model_input": (2, 4, 16, 16), "timestep": (2,), "context": (2, 77, 128)}
    with pytest.raises(EngineError, match=r"in fp8, which GPUs of compute capability 8\.6 cannot: it takes 8\.9"):
        Planner("tensorrt-rtx", {"compute_capability": "8.6"}).plan(bundle, fp8, shapes)


def test_a_quantized_bundle_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is in int8 already: give the one that it was made from"):
        quantize_bundle(quantized, tmp_path / "again", precision="fp8")


def test_convolutions_in_half_the_products_are_not_quantized(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLE, tmp_path / "bundle")
    manifest = Bundle.open(folder).manifest
    graphs = tuple(each.model_copy(update={"winograd": int(each.name == "denoiser")}) for each in manifest.graphs)
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(RequestError, match="was exported with winograd, whose sums 8 bits do not hold: give one with"):
        quantize_bundle(folder, tmp_path / "out", precision="int8")
    assert not (tmp_path / "out").exists()


def test_a_denoiser_that_lost_too_much_is_not_kept(
    optimizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOST", 1e-6)
    with pytest.raises(ExportError, match=r"off by 0\.\d+ of its output, where 1e-06 is allowed: keep more layers"):
        quantize_bundle(BUNDLE, tmp_path / "out", **SHORT, tries=0, python=optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["stub"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4': choose int8 or fp8"),
        ({"prompts": ["one"]}, "1 prompts are given: give 2 or more"),
        ({"keep": ["nothing.*"]}, "--keep 'nothing.*' is no layer"),
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"tries": -1}, "tries is -1: give 0 or more"),
        ({"python": "/nowhere/python"}, "/nowhere/python cannot be run"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        quantize_bundle(BUNDLE, tmp_path / "out", **SHORT | given)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_is_one_line_and_its_log_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    stub = program(tmp_path, "echo loading", "echo 'no tensor cores' >&2", "exit 3")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    line = ["quantize", str(BUNDLE), "-o", str(tmp_path / "out"), "--precision", "int8", "--steps", "1"]
    assert run([*line, "--threads", "1", "--prompts", str(tmp_path / "prompts.txt"), "--python", str(stub)]) == 1
    (log,) = (tmp_path / "home" / "model-optimizer").glob("*.log")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "latentrt: error: Model Optimizer failed (exit code 3): no tensor cores; all that it said is in " + str(log)
    )
    assert log.read_text(encoding="utf-8") == "loading\nno tensor cores\n"
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*")) == []


def test_a_program_that_writes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"wrote no quantized graph .*: give a Python with nvidia-modelopt"):
        quantize_bundle(BUNDLE, tmp_path / "out", **SHORT, python=program(tmp_path, "true"))


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_an_interrupt_ends_the_program_and_leaves_nothing(tmp_path: Path) -> None:
    stub = program(tmp_path, f"echo $$ > {tmp_path}/pid", "sleep 600")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    line = ["quantize", str(BUNDLE), "-o", str(tmp_path / "out"), "--precision", "int8", "--steps", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "latentrt.runtime", *line, "--prompts", str(tmp_path / "prompts.txt"), "--python", stub],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "latentrt: error: interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pid", "prompts.txt", "stub"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_python_without_the_program_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(work, "record", lambda *given, **named: pytest.fail("a prompt was drawn"))
    line = ["quantize", str(BUNDLE), "-o", str(tmp_path / "out"), "--precision", "int8", "--python"]
    stub = program(tmp_path, imports="echo \"No module named 'modelopt'\" >&2; exit 1")
    assert run([*line, str(stub)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"importing Model Optimizer with {stub} failed (exit code 1): No module named 'modelopt'" in said
    assert said.endswith("; give a Python with nvidia-modelopt[onnx]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "stub"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_what_others_may_have_put_into_the_environment_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "_make", lambda folder, *_: (folder / "bin").mkdir())
    python = environment.environment(silent)
    root, folder = python.parents[2], python.parents[1]
    assert root == tmp_path / "model-optimizer" and root.stat().st_mode & 0o777 == 0o700
    for place in (folder / "bin", folder, root):
        mode = place.stat().st_mode & 0o777
        place.chmod(0o777)
        with pytest.raises(StorageError, match=f"{place} can be written by everybody"):
            environment.environment(silent)
        place.chmod(mode)
    assert environment.environment(silent) == python
    root.chmod(0o777)
    with pytest.raises(StorageError, match="can be written by everybody"):  # else a link in the log's place is followed
        environment.run(["true"], "nothing")


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_what_a_program_writes_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    before = os.umask(0)
    try:
        environment.run([str(program(tmp_path, f"mkdir {tmp_path}/made"))], "mkdir")
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


def test_the_environment_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    said: list[list[str]] = []

    def fake(command: Sequence[str], what: str) -> list[str]:
        said.append(list(command))
        if what == "pip" and len(said) == 2:
            raise ExportError("pip failed (exit code 1): no network")
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir()
            (Path(command[-1]) / "bin" / "python").symlink_to(sys.executable)
        return []

    monkeypatch.setattr(environment, "run", fake)
    monkeypatch.setattr(environment, "_share", lambda python, torch: None)
    with pytest.raises(ExportError, match="no network"):
        environment.environment(silent)
    root = tmp_path / "model-optimizer"
    assert [path for path in root.iterdir() if path.suffix != ".lock"] == []  # half made, never used
    python = environment.environment(silent)
    assert python.exists() and python.is_relative_to(root)
    made = len(said)
    assert environment.environment(silent) == python and len(said) == made
    assert said[-1][-1] == environment.IMPORT  # whole: it imports what it is for
    assert all(
        "==" in package for command in said[:-1] for package in command if "modelopt" in package and "/" not in package
    )


@pytest.mark.long
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_model_optimizer_itself(precision: Any, tmp_path: Path) -> None:
    python = os.environ.get("LATENTRT_MODELOPT_PYTHON")
    if not python:
        pytest.skip("LATENTRT_MODELOPT_PYTHON names no Python with nvidia-modelopt")
    done = quantize_bundle(BUNDLE, tmp_path / "out", **SHORT | {"precision": precision, "steps": 4}, python=python)
    info = Bundle.open(done).graph("denoiser").quantization
    assert info is not None and info.precision == precision and info.tool.startswith("nvidia-modelopt 0.")
    assert info.layers > 80 and 1e-3 < info.relative_error < 0.1
