"""Engines that are whole by their hashes and do not load: dropped, built once more, and then one clear line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.errors import EngineError
from latentrt.engines.files import sha256_of
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.tensorrt.backend import TensorRt

from .simulated_backends import tensorrt_backend

SHAPES = {"x": (2, 8)}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def truncate(folder: Path, name: str) -> None:
    """Cut an engine's file in half, and let its description say that it is as it was built."""
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    sidecar = json.loads((folder / SIDECAR).read_text())
    sidecar["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    (folder / SIDECAR).write_text(json.dumps(sidecar))


def only(cache: EngineCache) -> Path:
    (entry,) = cache.entries()
    return Path(entry["folder"])


def builds(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the graphs that are built on the processor from now on."""
    built: list[str] = []
    ordinary = OnnxRuntimeCpu._build

    def build(self: OnnxRuntimeCpu, bundle: Bundle, graph: Any, out: Path) -> dict[str, Any]:
        built.append(graph.name)
        return ordinary(self, bundle, graph, out)

    patch.setattr(OnnxRuntimeCpu, "_build", build)
    return built


def test_a_truncated_optimized_graph_is_built_again(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, graph = OnnxRuntimeCpu(cache=cache, threads=1), bundle.graph("first")
    backend.open(bundle, graph).close()
    truncate(only(cache), "model.onnx")
    built = builds(monkeypatch)
    for _ in range(2):
        backend.open(bundle, graph).close()
    assert built == ["first"] and "cannot be loaded" in caplog.text and cache.verify() == {}


def test_an_optimized_graph_that_never_loads_is_one_line(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, ordinary = builds(monkeypatch), OnnxRuntimeCpu._built

    def truncated(self: OnnxRuntimeCpu, bundle: Bundle, graph: Any) -> Path:
        folder = ordinary(self, bundle, graph)
        truncate(folder, "model.onnx")
        return folder

    monkeypatch.setattr(OnnxRuntimeCpu, "_built", truncated)
    with pytest.raises(EngineError, match=r"cannot be loaded .*, although it was built just now: install") as caught:
        OnnxRuntimeCpu(cache=cache, threads=1).open(bundle, bundle.graph("first"))
    assert len(built) == 2 and "\n" not in str(caught.value)


def test_an_optimized_graph_is_kept_when_memory_runs_out(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    backend, graph = OnnxRuntimeCpu(cache=cache, threads=1), bundle.graph("first")
    backend.open(bundle, graph).close()
    folder, built = only(cache), builds(monkeypatch)

    def session(*_: Any, **__: Any) -> Any:
        raise RuntimeError("bfc_arena.cc:359: Failed to allocate memory for requested buffer of size 4096")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", session)
        with pytest.raises(EngineError, match="out of memory on onnxruntime-cpu while engine first was loaded"):
            backend.open(bundle, graph)
    assert only(cache) == folder and not built
    backend.open(bundle, graph)


def refuse(backend: TensorRt, patch: pytest.MonkeyPatch, times: int, *, error: Exception | None = None) -> None:
    """Let the simulated library refuse a plan so many times: it gives None, or raises."""
    trt = backend.planner.library.trt
    runtime, left = trt.Runtime(None), [None] * times
    ordinary = runtime.deserialize_cuda_engine

    def deserialize(plan: Any) -> Any:
        if not left:
            return ordinary(plan)
        left.pop()
        if error is not None:
            raise error
        return None

    patch.setattr(runtime, "deserialize_cuda_engine", deserialize)


@pytest.mark.parametrize("error", [None, RuntimeError("no plan of this version")])
def test_a_plan_that_does_not_load_is_built_once_more(
    bundle: Bundle,
    cache: EngineCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
) -> None:
    backend, graph = tensorrt_backend(monkeypatch, cache), bundle.graph("first")
    refuse(backend, monkeypatch, 1, error=error)
    with caplog.at_level(logging.WARNING):
        engine = backend.open(bundle, graph, SHAPES)
    assert "cannot be loaded" in caplog.text and "it is built again" in caplog.text
    engine.bind({name: backend.device.empty((2, 8), np.float32) for name in "xy"})
    engine.close()
    before = only(cache)
    refuse(backend, monkeypatch, 9, error=error)
    with pytest.raises(EngineError, match=r"cannot be loaded.*; it was built just now: use another backend") as caught:
        backend.open(bundle, graph, SHAPES)
    assert "\n" not in str(caught.value) and only(cache) == before and not backend._loaded


def test_a_plan_that_does_not_load_where_none_is_built_says_how(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.graph("first")
    tensorrt_backend(monkeypatch, cache).open(bundle, graph, SHAPES).close()
    backend = tensorrt_backend(monkeypatch, cache, build=False)
    refuse(backend, monkeypatch, 1)
    with pytest.raises(EngineError, match=r"cannot be loaded.*; it was removed: build it again with `latentrt build "):
        backend.open(bundle, graph, SHAPES)
    assert not cache.entries()  # else the command would find it there


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[E] OutOfMemory: 4 GiB could not be allocated")])
def test_a_plan_is_kept_when_memory_runs_out(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    graph = bundle.graph("first")
    tensorrt_backend(monkeypatch, cache).open(bundle, graph, SHAPES).close()
    before, backend = only(cache), tensorrt_backend(monkeypatch, cache)
    refuse(backend, monkeypatch, 1, error=error)
    with pytest.raises(EngineError, match=r"out of memory on tensorrt while the plan of first .*weights_on_gpu=0"):
        backend.open(bundle, graph, SHAPES)
    assert only(cache) == before
    backend.open(bundle, graph, SHAPES)
