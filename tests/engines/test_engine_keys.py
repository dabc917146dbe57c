"""What an engine of the processor is kept under: whatever changes it is a miss, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from latentrt.engines.bundle import Bundle, Parity, describe_files, write_manifest
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.onnxruntime import cpu
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from onnx import numpy_helper

from .small_bundles import WEIGHT, random


def result(bundle: Bundle, cache: EngineCache) -> np.ndarray:  # type: ignore[type-arg]
    """Return what an engine from the cache computes."""
    backend = OnnxRuntimeCpu(cache=cache, threads=1)
    engine = backend.open(bundle, bundle.graph("first"))
    stream, x, y = backend.device.stream(), *(backend.device.empty((2, 8), np.float32) for _ in "xy")
    x.write(random(2, 8), stream)
    engine.bind({"x": x, "y": y}).enqueue(stream)
    engine.close()
    return y.read(stream)


def with_other_weights(bundle: Bundle) -> Bundle:
    """Return the bundle, written anew with every weight doubled."""
    file = bundle.path / "first.onnx"
    model = onnx.load(file)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(2 * WEIGHT, "weight"))
    onnx.save(model, file)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": describe_files(bundle.path)}))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("change", ["processor", "onnxruntime", "builder", "graph"])
def test_whatever_changes_an_engine_is_a_miss_and_nothing_else_is(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cache = EngineCache(tmp_path / "engines")
    for _ in range(2):
        np.testing.assert_allclose(result(bundle, cache), random(2, 8) @ WEIGHT, atol=1e-5)
    assert len(cache.entries()) == 1
    factor = 1
    if change == "processor":
        monkeypatch.setattr(cpu, "processor_identity", lambda: "another processor")
    elif change == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    elif change == "builder":
        monkeypatch.setattr(cpu, "BUILDER", cpu.BUILDER + 1)
    else:
        bundle, factor = with_other_weights(bundle), 2
    np.testing.assert_allclose(result(bundle, cache), factor * random(2, 8) @ WEIGHT, atol=1e-5)
    assert len(cache.entries()) == 2


def test_an_engine_in_the_place_of_another_is_a_miss(bundle: Bundle, tmp_path: Path) -> None:
    """As where a cache was copied by hand, or a key is written down in another way."""
    cache, graph = EngineCache(tmp_path / "engines"), bundle.graph("first")
    backend = OnnxRuntimeCpu(cache=cache, threads=1)
    backend.open(bundle, graph).close()
    key = backend.key(bundle, graph)
    (folder,) = cache.root.glob("first-*")
    sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    (folder / SIDECAR).write_text(json.dumps({**sidecar, "key": {**key, "cpu": "another"}}), encoding="utf-8")
    assert cache.find("first", key) is None


def test_only_a_step_graph_of_no_module_runs_in_one_thread(bundle: Bundle, tmp_path: Path) -> None:
    backend, first = OnnxRuntimeCpu(cache=EngineCache(tmp_path / "engines")), bundle.graph("first")
    backend.threads = 3
    networks = Parity(max_abs_error=0, relative_error=0)
    for stage, parity, threads in (("step", None, 1), ("step", networks, 3), ("end", None, 3)):
        graph = first.model_copy(update={"stage": stage, "parity": parity})
        _, session = backend._loaded(bundle, graph)
        assert session.get_session_options().intra_op_num_threads == threads, (stage, parity)
