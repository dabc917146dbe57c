"""A failure at every call that can fail while a batcher draws: errors that say so, nothing left behind, and then right.

In the default suite a few of them, in the slow tests all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.device import Array
from latentrt.engines.errors import EngineError
from latentrt.engines.host import HostDevice, HostStream
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeBinding
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher, pool

from ..engines import simulated_backends
from ..engines.failures import OF_THE_LIBRARY, Nth, broken, no_memory
from ..engines.simulated_cuda import SimulatedDriver
from .test_swaps import Unsettled

TINY: dict[str, Any] = {"height": 32, "width": 32, "output_type": "np", "prompt": "a red circle"}
REQUESTS: list[dict[str, Any]] = [
    {**TINY, "seed": 1, "num_inference_steps": 5, "sampler": "euler_a"},
    {**TINY, "seed": 2, "num_inference_steps": 3, "guidance_scale": 1.0},
    {**TINY, "seed": 3, "num_inference_steps": 4, "sampler": "unipc", "image": np.full((32, 32, 3), 0.7, np.float32)},
]
SLOW = pytest.param(1, marks=pytest.mark.slow)
EVERY = pytest.mark.parametrize("stride", [None, SLOW], ids=["a few", "every one"])
EVERY_OF_A_GPU = pytest.mark.parametrize(
    "stride", [pytest.param(None, marks=pytest.mark.long), SLOW], ids=["a few", "every one"]
)
A_FEW = 2


def survives(pipe: Pipeline, nth: Nth, held: Callable[[], object], stride: int | None) -> None:
    """Let calls fail in turn, every `stride`-th, or a few at even distances."""
    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        expected = [batcher.submit(**request).result(300).images for request in REQUESTS]
    before, nth.calls = held(), 0
    draw(pipe, nth, expected, fails_at=0)
    made, failed = nth.calls, 0
    assert made >= 2 and held() == before
    for number in range(1, made + 1, stride or max(1, made // A_FEW)):
        failed += draw(pipe, nth, expected, fails_at=number)
        assert held() == before, number
    assert failed


def draw(pipe: Pipeline, nth: Nth, expected: list[Array], *, fails_at: int) -> bool:
    """Draw all requests twice, in the first round with a failure, and tell whether anything came of it."""
    failed = False
    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        for calm in (False, True):
            nth.calls, nth.fails_at = 0, 0 if calm else fails_at
            futures = [batcher.submit(**request) for request in REQUESTS]
            for future, images in zip(futures, expected, strict=True):
                error = future.exception(300)
                if error is None:
                    np.testing.assert_array_equal(future.result().images, images)
                else:
                    assert not calm and isinstance(error, EngineError) and str(error).isprintable(), repr(error)
                    failed = True
            if not calm:
                made = nth.calls
            nth.fails_at = 0
        nth.calls = made
        return failed or batcher.stats().retried > 0


@pytest.fixture(autouse=True)
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images leave their slots and come back."""
    monkeypatch.setattr(pool, "decide", lambda *seen, **how: Unsettled(seed=1)(*seen, **how))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("plans"))


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver()


@pytest.fixture
def gpu(plans: EngineCache, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    backend = simulated_backends.tensorrt_backend(monkeypatch, plans, driver)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe:
        yield pipe
    gc.collect()  # errors have frames, which have events
    backend.device.close()
    assert not +driver.live


ON_THE_GPU = {
    "memory": ["_cuMemAlloc", "_cuMemHostAlloc"],
    "captures": ["_cuStreamBeginCapture", "_cuGraphInstantiate", "_cuGraphUpload", "_cuGraphLaunch"],
    "points": ["_cuEventCreate", "_cuEventRecord", "_cuEventSynchronize"],
    "copies": ["_cuMemcpyHtoDAsync", "_cuMemcpyDtoHAsync", "_cuMemcpyDtoDAsync", "_cuStreamSynchronize"],
}


@EVERY_OF_A_GPU
@pytest.mark.parametrize("what", ON_THE_GPU)
def test_calls_of_the_driver(
    gpu: Pipeline, driver: SimulatedDriver, what: str, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nth, kinds = Nth(no_memory), ("memory", "pinned", "graph", "executable", "stream", "context")
    for call in ON_THE_GPU[what]:
        monkeypatch.setattr(driver, call, nth.instead_of(getattr(driver, call)), raising=False)
    if stride and what in ("points", "copies"):
        stride = 13
    survives(gpu, nth, lambda: [driver.live[kind] for kind in kinds], stride)


@EVERY_OF_A_GPU
@pytest.mark.parametrize("what", OF_THE_LIBRARY)
def test_calls_of_the_library(
    gpu: Pipeline, driver: SimulatedDriver, what: str, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, failure = OF_THE_LIBRARY[what]
    nth, kind = Nth(failure), simulated_backends.Context
    monkeypatch.setattr(kind, call, nth.instead_of(getattr(kind, call)))
    survives(gpu, nth, gpu.backend.device.tensor_bytes, stride)


ON_THE_HOST: dict[str, tuple[type, str]] = {
    "memory": (HostDevice, "empty"),
    "bind": (OnnxRuntimeEngine, "bind"),
    "enqueue": (OnnxRuntimeBinding, "enqueue"),
    "captures": (HostStream, "capture"),
    "points": (HostStream, "record"),
}


@EVERY
@pytest.mark.parametrize("what", ON_THE_HOST)
def test_calls_on_the_host(pipe: Pipeline, what: str, stride: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, call = ON_THE_HOST[what]
    nth = Nth(broken)
    monkeypatch.setattr(kind, call, nth.instead_of(getattr(kind, call)))
    survives(pipe, nth, pipe.backend.device.tensor_bytes, stride)
