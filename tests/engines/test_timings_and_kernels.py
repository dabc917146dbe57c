"""What TensorRT measures and TensorRT-RTX compiles is kept, and what another version or GPU left is not taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.tensorrt import planner
from latentrt.engines.tensorrt.library import Library
from latentrt.engines.tensorrt.plan import PlanOptions, Profile
from latentrt.engines.tensorrt.planner import Planner

from .simulated_backends import Context, Session, build_here, tensorrt_backend
from .simulated_cuda import SimulatedDriver
from .small_bundles import WEIGHT, random


class Config:
    """Stands in for `IBuilderConfig`: takes timings of its own version, and others only when it is told to."""

    def __init__(self, version: bytes) -> None:
        self.version = version
        self.timings: bytes | None = None
        self.flags: set[str] = set()

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, timings: bytes, ignore_mismatch: bool) -> bool:
        fits = not timings or timings.startswith(self.version) or ignore_mismatch
        self.timings = timings if fits else self.timings
        return fits

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.version + (self.timings or b"")[len(self.version) :] + b"+")

    def add_optimization_profile(self, shapes: Any) -> int:
        return 0

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)


class Builder:
    """Stands in for `IBuilder`: a plan is what it was built with."""

    def __init__(self, version: bytes, network: Any, networks: list[int]) -> None:
        self.config, self.network, self.networks = Config(version), network, networks

    def create_network(self, flags: int) -> Any:
        self.networks.append(flags)
        return self.network

    def create_builder_config(self) -> Config:
        return self.config

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *_: None)

    def build_serialized_network(self, network: Any, config: Config) -> bytes:
        return b"with " + (config.timings if config.timings is not None else b"none")


def library(version: str, networks: list[int]) -> Any:
    """Return a TensorRT of a version that builds what the bundle's graph `first` declares."""
    tensors = {
        "input": [SimpleNamespace(name="x", dtype=SimpleNamespace(name="FLOAT"), shape=(2, 8))],
        "output": [
            SimpleNamespace(name="y", dtype=SimpleNamespace(name="FLOAT"), shape=(2, 8)),
            SimpleNamespace(name="total", dtype=SimpleNamespace(name="FLOAT"), shape=()),
        ],
    }
    network = SimpleNamespace(
        num_layers=0,
        num_inputs=1,
        num_outputs=2,
        get_input=lambda i: tensors["input"][i],
        get_output=lambda i: tensors["output"][i],
    )
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=3),
        LayerType=SimpleNamespace(),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda data, path: True),
        Builder=lambda logger: Builder(version.encode(), network, networks),
    )
    return SimpleNamespace(
        trt=trt,
        backend="tensorrt",
        version=version,
        reads_attention=True,
        errors=[],
        logger=None,
        failure=Library.failure,
    )


def build(bundle: Bundle, cache: EngineCache, patch: pytest.MonkeyPatch, version: str, gpu: str, rows: int) -> bytes:
    """Build a plan for a number of rows and return it."""
    networks: list[int] = []
    build_here(patch)
    patch.setattr(planner, "load_library", lambda name: library(version, networks))
    profile = Profile.of({"x": (rows, 8)})
    made = Planner("tensorrt", {"gpu": gpu}, cache=cache, options=PlanOptions())
    plan = made.build(bundle, bundle.graph("first"), profile)
    assert networks == [1 << 3]  # strongly typed
    return plan.path.read_bytes()


def test_timings_serve_later_builds_of_the_same_version_and_gpu(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path / "engines")
    assert build(bundle, cache, monkeypatch, "10.9", "GPU A", 1) == b"with "
    assert build(bundle, cache, monkeypatch, "10.9", "GPU A", 2) == b"with 10.9+"
    assert build(bundle, cache, monkeypatch, "10.9", "GPU B", 1) == b"with "
    assert build(bundle, cache, monkeypatch, "11.0", "GPU A", 1) == b"with "
    assert build(bundle, cache, monkeypatch, "10.9", "GPU A", 3) == b"with 10.9++"


def test_timings_that_the_library_does_not_take_are_left(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path / "engines")
    build(bundle, cache, monkeypatch, "10.9", "GPU", 1)
    (kept,) = cache.root.glob("timings-*")
    kept.write_bytes(b"of another GPU")
    assert build(bundle, cache, monkeypatch, "10.9", "GPU", 2) == b"with "
    assert kept.read_bytes().startswith(b"10.9")


class Kernels:
    """Stands in for `IRuntimeCache`: holds what was compiled, and what it was given of earlier runs."""

    def __init__(self) -> None:
        self.known: list[bytes] = []

    def deserialize(self, data: bytes) -> None:
        self.known.append(data)

    def serialize(self) -> bytes:
        return b"kernels"


def with_kernels(backend: Any, driver: SimulatedDriver, made: list[Kernels]) -> None:
    """Let the simulated TensorRT have what only TensorRT-RTX has."""
    trt = backend.planner.library.trt
    trt.IRuntimeCache = object
    trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def config() -> Any:
        def create() -> Kernels:
            made.append(Kernels())
            return made[-1]

        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=create,
            set_runtime_cache=lambda kernels: None,
        )

    def deserialize(plan: bytes) -> Any:
        session = Session(bytes(plan), None, driver)
        return SimpleNamespace(create_execution_context=lambda how: Context(session), create_runtime_config=config)

    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)


def test_kernels_that_were_compiled_are_there_at_the_next_start(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Kernels] = []
    for start in range(2):
        driver = SimulatedDriver()
        backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "engines"), driver)
        with_kernels(backend, driver, made)
        engine, stream = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}), backend.device.stream()
        x, y = (backend.device.empty((2, 8), np.float32) for _ in "xy")
        x.write(random(2, 8), stream)
        run = engine.bind({"x": x, "y": y})
        run.enqueue(stream)
        np.testing.assert_allclose(y.read(stream), random(2, 8) @ WEIGHT, atol=1e-5)
        (kept,) = (tmp_path / "engines").glob("*/kernels.cache")
        assert kept.read_bytes() == b"kernels"
        assert made[-1].known == [b"kernels"] * start
        engine.close()
