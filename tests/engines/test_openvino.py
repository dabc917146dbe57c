"""OpenVINO: what its engines are kept under, what they compute in, and what it cannot take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, Parity, TensorInfo
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.machine import has_bf16
from latentrt.engines.openvino.library import load_openvino
from onnx import helper

from .small_bundles import WEIGHT, graph_info, proto, random, write_bundle
from .test_loading import truncate

try:
    openvino: Any = load_openvino()
except ImportError:
    pytest.skip("openvino is not installed", allow_module_level=True)

from latentrt.engines.openvino import backend as module
from latentrt.engines.openvino import format as module_format
from latentrt.engines.openvino.backend import OpenVino

NETWORK = Parity(max_abs_error=0, relative_error=0)
with_bf16 = pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16 units")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def bound(backend: OpenVino, engine: Any, rows: int = 2) -> tuple[Any, Any]:
    """Return a binding of an engine of the first graph to rows of numbers, and the tensor of its result."""
    x, y = (backend.device.empty((rows, 8), np.float32) for _ in "xy")
    x.write(random(rows, 8), backend.device.stream())
    return engine.bind({"x": x, "y": y}), y


def result(bundle: Bundle, backend: OpenVino, graph: Any = None, rows: int = 2) -> Any:
    """Return what an engine of the first graph computes."""
    engine, stream = backend.open(bundle, graph or bundle.graph("first")), backend.device.stream()
    binding, y = bound(backend, engine, rows)
    binding.enqueue(stream)
    engine.close()
    return y.read(stream)


def compiles(patch: pytest.MonkeyPatch) -> list[Any]:
    """Return the shapes that are compiled for from now on."""
    compiled: list[Any] = []
    ordinary = OpenVino._compile

    def compile(self: OpenVino, folder: Path, graph: Any, shapes: Any, out: Path) -> dict[str, Any]:
        compiled.append(shapes and shapes["x"])
        return ordinary(self, folder, graph, shapes, out)

    patch.setattr(OpenVino, "_compile", compile)
    return compiled


def folders(cache: EngineCache, file: str) -> list[Path]:
    """Return the engines in a cache that have a file."""
    return [entry["folder"] for entry in cache.entries() if file in entry["files"]]


@pytest.mark.parametrize("change", ["processor", "version", "builder", "threads"])
def test_whatever_changes_an_engine_is_a_miss_and_nothing_else_is(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for _ in range(2):
        np.testing.assert_allclose(result(bundle, OpenVino(cache=cache, threads=1)), random(2, 8) @ WEIGHT, atol=1e-5)
    assert len(cache.entries()) == 2
    compiled = compiles(monkeypatch)
    if change == "processor":
        monkeypatch.setattr(module, "processor_identity", lambda: "another processor")
    elif change == "version":
        monkeypatch.setattr(openvino, "__version__", "99.0")
    elif change == "builder":
        monkeypatch.setattr(module, "BUILDER", module.BUILDER + 1)
    result(bundle, OpenVino(cache=cache, threads=min(2, os.cpu_count() or 1)))
    assert compiled == ([] if change == "threads" else [(2, 8)])


@with_bf16
def test_networks_compute_in_the_precision_that_is_asked_for_and_the_step_does_not(
    bundle: Bundle, cache: EngineCache
) -> None:
    exact, network = random(2, 8) @ WEIGHT, bundle.graph("first").model_copy(update={"parity": NETWORK})
    step = bundle.graph("first").model_copy(update={"stage": "step"})
    found = {
        name: result(bundle, OpenVino(cache=cache, threads=1, precision=name), network) for name in ("f32", "bf16")
    }
    assert np.abs(found["f32"] - exact).max() < 1e-5 < 1e-4 < np.abs(found["bf16"] - exact).max() < 0.1
    assert len(folders(cache, "compiled.blob")) == 2 and len(folders(cache, "model.bin")) == 2
    updated = result(bundle, OpenVino(cache=cache, threads=1, precision="bf16"), step)
    np.testing.assert_allclose(updated, exact, atol=1e-5)


@with_bf16
@pytest.mark.parametrize("shapes", ["fixed", "any"])
def test_angles_are_not_rounded_where_the_rest_is(tmp_path: Path, cache: EngineCache, shapes: Any) -> None:
    """bf16 has no 499 and no 951.5: sines of their products with frequencies would be those of other angles."""
    frequencies = np.exp(-np.arange(8) / 2).astype(np.float32)[None]
    t, y = TensorInfo(name="t", dtype="float32", shape=("B",)), TensorInfo(name="y", dtype="float32", shape=("B", 8))
    info = graph_info("angles", [t], [y]).model_copy(update={"parity": NETWORK})
    nodes = [
        helper.make_node("Unsqueeze", ["t", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["sine"]),
        helper.make_node("MatMul", ["sine", "weight"], ["product"]),
        helper.make_node("MatMul", ["product", "weight"], ["y"]),
    ]
    constants = {"axis": np.array([1]), "frequencies": frequencies, "weight": np.eye(8, dtype=np.float32)}
    bundle = write_bundle(tmp_path / "bundle", (info, proto(info, nodes, constants)))
    backend = OpenVino(cache=cache, threads=1, precision="bf16", shapes=shapes)
    given, stream = np.array([1, 37, 499, 951.5, 999], np.float32), backend.device.stream()
    times, sines = backend.device.empty((5,), np.float32), backend.device.empty((5, 8), np.float32)
    times.write(given, stream)
    backend.open(bundle, bundle.graph("angles")).bind({"t": times, "y": sines}).enqueue(stream)
    np.testing.assert_allclose(sines.read(stream), np.sin(given[:, None] * frequencies), atol=0.01)


@with_bf16
def test_weights_are_stored_in_what_they_are_multiplied_in_and_give_the_same_numbers(
    tmp_path: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (TensorInfo(name=name, dtype="float32", shape=("B", 80)) for name in "xy")
    info = graph_info("square", [x], [y]).model_copy(update={"parity": NETWORK})
    weight = random(80, 80)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("MatMul", ["p", "w"], ["y"])]
    bundle, found = write_bundle(tmp_path / "bundle", (info, proto(info, nodes, {"w": weight}))), []
    for few in (1 << 30, module_format.FEW):
        monkeypatch.setattr(module_format, "FEW", few)
        backend = OpenVino(cache=EngineCache(cache.root / str(few)), threads=1, precision="bf16")
        given, result = (backend.device.empty((3, 80), np.float32) for _ in "xy")
        given.write(random(3, 80, seed=1), backend.device.stream())
        backend.open(bundle, bundle.graph("square")).bind({"x": given, "y": result}).enqueue(backend.device.stream())
        (folder,) = folders(EngineCache(cache.root / str(few)), "model.bin")
        found.append((result.read(backend.device.stream()), (folder / "model.bin").stat().st_size))
    assert found[0][0].tobytes() == found[1][0].tobytes()
    assert found[0][1] >= weight.nbytes > found[1][1] >= weight.nbytes // 2


def test_a_damaged_engine_is_compiled_again(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = OpenVino(cache=cache, threads=1)
    result(bundle, backend)
    truncate(*folders(cache, "compiled.blob"), "compiled.blob")
    compiled = compiles(monkeypatch)
    for _ in range(2):
        np.testing.assert_allclose(result(bundle, backend), random(2, 8) @ WEIGHT, atol=1e-5)
    assert compiled == [(2, 8)] and "cannot be loaded" in caplog.text


@pytest.mark.parametrize("shapes", ["fixed", "any"])
def test_a_model_is_compiled_for_each_shape_or_one_for_all_of_them(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, shapes: Any
) -> None:
    compiled = compiles(monkeypatch)
    for rows in (2, 5, 2):
        found = result(bundle, OpenVino(cache=cache, threads=1, shapes=shapes), rows=rows)
        np.testing.assert_allclose(found, random(rows, 8) @ WEIGHT, atol=1e-5)
    assert compiled == ([(2, 8), (5, 8)] if shapes == "fixed" else [None])
    assert len(folders(cache, "model.bin")) == 1  # weights are kept once


def test_shapes_beyond_those_that_memory_is_for_share_a_model_until_one_is_free(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    compiled, backend = compiles(monkeypatch), OpenVino(cache=cache, threads=1)
    engine, stream = backend.open(bundle, bundle.graph("first")), backend.device.stream()
    used = {rows: bound(backend, engine, rows) for rows in (1, 2, 3, 4)}
    assert compiled == [(1, 8), (2, 8), None]
    for rows, (binding, y) in used.items():
        binding.enqueue(stream)
        np.testing.assert_allclose(y.read(stream), random(rows, 8) @ WEIGHT, atol=1e-5)
    del used[1], binding
    used[5] = bound(backend, engine, 5)
    assert compiled == [(1, 8), (2, 8), None, (5, 8)]
    used[2] = bound(backend, engine, 2)
    assert len(compiled) == 4


def test_a_bundle_of_links_is_read_and_nothing_is_written_beside_it(bundle: Bundle, cache: EngineCache) -> None:
    blobs = bundle.path.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(bundle.path.glob("*.onnx*"))):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    before = sorted((file.name, file.stat().st_mtime_ns) for file in (*bundle.path.iterdir(), *blobs.iterdir()))
    linked = Bundle.open(bundle.path)
    np.testing.assert_allclose(result(linked, OpenVino(cache=cache, threads=1)), random(2, 8) @ WEIGHT, atol=1e-5)
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (*bundle.path.iterdir(), *blobs.iterdir())) == before
    assert len(folders(cache, "model.bin")) == 1
    assert not [file for entry in cache.entries() for file in entry["folder"].iterdir() if file.is_dir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4': choose f32, bf16, f16"),
        ({"device": "TPU"}, "device is 'TPU': choose CPU or GPU"),
        ({"shapes": "some"}, "shapes is 'some': choose fixed or any"),
        ({"threads": 0}, r"threads is 0: this machine has \d+ cores"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        OpenVino(**options)


def test_a_processor_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = openvino.Core.get_property

    def property_of(self: Any, device: str, name: str) -> Any:
        return ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else ordinary(self, device, name)

    monkeypatch.setattr(openvino.Core, "get_property", property_of)
    with pytest.raises(
        RequestError, match="precision is 'bf16', which this CPU does not compute in: it has FP32, INT8"
    ):
        OpenVino(precision="bf16")


def test_a_graph_that_openvino_cannot_take_is_one_line(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Exception from src/inference\nsome node is not supported\n")

    backend = OpenVino(cache=cache, threads=1)
    monkeypatch.setattr(openvino, "serialize", refuse)
    with pytest.raises(EngineError, match="graph first cannot be built for openvino") as caught:
        backend.open(bundle, bundle.graph("first"))
    assert "\n" not in str(caught.value) and cache.entries() == []


def test_a_closed_engine_says_so(bundle: Bundle, cache: EngineCache) -> None:
    backend = OpenVino(cache=cache, threads=1)
    engine = backend.open(bundle, bundle.graph("first"))
    tensors = {name: backend.device.empty((2, 8), np.float32) for name in "xy"}
    bound, stream = engine.bind(tensors), backend.device.stream()
    engine.close()
    with pytest.raises(EngineError, match="engine first is closed"):
        bound.enqueue(stream)
    with pytest.raises(EngineError, match="engine first is closed"):
        engine.bind(tensors)


def test_nothing_is_sent_and_no_id_is_kept(tmp_path: Path) -> None:
    """OpenVINO's own first import looks up an analytics server and writes an id below the home folder."""
    program = (
        "import sys\n"
        "from latentrt.engines.backends import open_backend\n"
        "open_backend('openvino', threads=1)\n"
        "import openvino.tools.ovc.telemetry_utils as utils\n"
        "print('openvino_telemetry' in sys.modules, utils.tm.__name__)\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "LATENTRT_HOME": str(tmp_path / "cache")}
    environment.pop("CI", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "openvino.tools.ovc.telemetry_stub"]
    assert not list(tmp_path.rglob("*ga_cid*")) and not (tmp_path / "intel").exists()


def test_a_program_that_has_telemetry_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", own)
    assert load_openvino() is openvino and sys.modules["openvino_telemetry"] is own


@pytest.mark.parametrize(("shapes", "lines"), [("fixed", 2), ("any", 1)])
def test_the_build_command_compiles_for_each_request_and_says_what_was_there(
    bundle: Bundle, cache: EngineCache, shapes: Any, lines: int
) -> None:
    from latentrt.runtime.cli.build import _open_each, _Wanted

    backend = OpenVino(cache=cache, threads=1, shapes=shapes)
    wanted = [_Wanted(f"{n} rows", {"first": [{"x": (n, 8)}]}) for n in (1, 2)]
    built, again = (list(_open_each(backend, bundle, wanted)) for _ in range(2))
    assert len(built) == lines and all(each.seconds and each.folder for each in built)
    assert [each.seconds for each in again] == [None] * lines
    assert len(folders(cache, "compiled.blob")) == lines


def test_one_engine_for_a_range_is_another_option(capsys: pytest.CaptureFixture[str]) -> None:
    from latentrt.export.embedded import BUNDLE
    from latentrt.runtime.cli import run

    assert run(["build", str(BUNDLE), "--backend", "openvino", "--dynamic", "--batch", "1", "--batch", "2"]) == 2
    said = capsys.readouterr()
    assert "--dynamic is for TensorRT: on openvino give --option shapes=any" in said.err and not said.out
