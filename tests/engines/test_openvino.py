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
from latentrt.engines.bundle import Bundle, Parity
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.machine import has_bf16
from latentrt.engines.openvino.library import load_openvino

from .small_bundles import WEIGHT, random
from .test_loading import only, truncate

try:
    openvino: Any = load_openvino()
except ImportError:
    pytest.skip("openvino is not installed", allow_module_level=True)

from latentrt.engines.openvino import backend as module
from latentrt.engines.openvino.backend import OpenVino

NETWORK = Parity(max_abs_error=0, relative_error=0)
with_bf16 = pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16 units")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def result(bundle: Bundle, backend: OpenVino, graph: Any = None) -> Any:
    """Return what an engine of the first graph computes."""
    engine = backend.open(bundle, graph or bundle.graph("first"))
    stream, x, y = backend.device.stream(), *(backend.device.empty((2, 8), np.float32) for _ in "xy")
    x.write(random(2, 8), stream)
    engine.bind({"x": x, "y": y}).enqueue(stream)
    engine.close()
    return y.read(stream)


def compiles(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the graphs that are compiled from now on."""
    compiled: list[str] = []
    ordinary = OpenVino._build

    def build(self: OpenVino, bundle: Bundle, graph: Any, out: Path) -> dict[str, Any]:
        compiled.append(graph.name)
        return ordinary(self, bundle, graph, out)

    patch.setattr(OpenVino, "_build", build)
    return compiled


@pytest.mark.parametrize("change", ["processor", "version", "builder", "threads"])
def test_whatever_changes_an_engine_is_a_miss_and_nothing_else_is(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for _ in range(2):
        np.testing.assert_allclose(result(bundle, OpenVino(cache=cache, threads=1)), random(2, 8) @ WEIGHT, atol=1e-5)
    assert len(cache.entries()) == 1
    compiled = compiles(monkeypatch)
    if change == "processor":
        monkeypatch.setattr(module, "processor_identity", lambda: "another processor")
    elif change == "version":
        monkeypatch.setattr(openvino, "__version__", "99.0")
    elif change == "builder":
        monkeypatch.setattr(module, "BUILDER", module.BUILDER + 1)
    result(bundle, OpenVino(cache=cache, threads=min(2, os.cpu_count() or 1)))
    assert compiled == ([] if change == "threads" else ["first"])


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
    assert len(cache.entries()) == 2
    updated = result(bundle, OpenVino(cache=cache, threads=1, precision="bf16"), step)
    np.testing.assert_allclose(updated, exact, atol=1e-5)


def test_a_damaged_engine_is_compiled_again(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = OpenVino(cache=cache, threads=1)
    result(bundle, backend)
    truncate(only(cache), "compiled.blob")
    compiled = compiles(monkeypatch)
    for _ in range(2):
        np.testing.assert_allclose(result(bundle, backend), random(2, 8) @ WEIGHT, atol=1e-5)
    assert compiled == ["first"] and "cannot be loaded" in caplog.text


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
    assert {file.name for file in only(cache).iterdir()} >= {"compiled.blob", "model.bin"}
    assert not [file for file in only(cache).iterdir() if file.is_dir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4': choose f32, bf16, f16"),
        ({"device": "TPU"}, "device is 'TPU': choose CPU or GPU"),
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
