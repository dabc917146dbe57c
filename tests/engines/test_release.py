"""What is closed on a GPU: after its own work, on its own GPU, without a word to other pipelines and their captures."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver
from latentrt.engines.cuda.memory import CudaTensor
from latentrt.engines.errors import EngineError

from .simulated_backends import onnxruntime_backend, tensorrt_backend
from .simulated_codes import CUresult, Failure
from .simulated_cuda import SimulatedDriver
from .small_bundles import WEIGHT, random

HELD = ("memory", "pinned", "graph", "executable")


def devices(driver: SimulatedDriver, *numbers: int) -> list[CudaDevice]:
    shared = Driver(driver)
    return [CudaDevice(number, shared) for number in numbers]


def used(device: CudaDevice, stream: Any) -> CudaTensor:
    """Return a tensor with pinned memory and a copy on its way."""
    tensor = device.empty((8,), np.float32)
    tensor.write(random(8), stream)
    return tensor


def held(driver: SimulatedDriver) -> dict[str, int]:
    return {kind: driver.live[kind] for kind in HELD if driver.live[kind]}


def failing(patch: pytest.MonkeyPatch, driver: SimulatedDriver, call: str, at: int = 1) -> None:
    """Let the `at`-th of these calls from now on fail for want of memory."""
    real: Callable[..., Any] = getattr(driver, f"_{call}")
    calls: list[None] = []

    def fail(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return real(*arguments)

    patch.setattr(driver, f"_{call}", fail)


def test_memory_is_made_on_the_gpu_that_was_asked_also_after_another_was_opened() -> None:
    driver = SimulatedDriver(gpus=2)
    first, second = devices(driver, 0, 1)
    tensors = [first.empty((1 << 20,), np.uint8), second.empty((1 << 20,), np.uint8)]
    assert all(device.bytes_taken() >= 1 << 20 for device in (first, second))
    driver._cuCtxSetCurrent(8)  # as another library does in this thread
    stream, tensor = first.stream(), first.empty((8,), np.float32)
    tensor.write(random(8), stream)
    np.testing.assert_array_equal(tensor.read(stream), random(8))
    for thing in (*tensors, tensor, stream, first, second):
        driver._cuCtxSetCurrent(8)
        thing.close()
    assert not +driver.live


def test_two_backends_on_two_gpus_take_turns_in_one_thread(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver(gpus=2)
    cache = [EngineCache(tmp_path / name) for name in "ab"]
    backends = [tensorrt_backend(monkeypatch, cache[gpu], driver, gpu=gpu) for gpu in (0, 1)]
    runs = []
    for backend in backends:
        stream, x, y = backend.device.stream(), *(backend.device.empty((2, 8), np.float32) for _ in "xy")
        runs.append((backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}).bind({"x": x, "y": y}), stream, x, y))
    assert driver.built_on == [0, 1]
    for seed in (1, 2):
        for run, stream, x, _ in runs:
            x.write(random(2, 8, seed=seed), stream)
            run.enqueue(stream)
        for _, stream, _, y in runs:
            np.testing.assert_allclose(y.read(stream), random(2, 8, seed=seed) @ WEIGHT, atol=1e-5)


@pytest.mark.parametrize("same", [True, False], ids=["one device", "two devices on one GPU"])
def test_closing_during_a_capture_breaks_nothing_and_frees_when_it_ends(same: bool) -> None:
    driver = SimulatedDriver()
    capturing, closing = devices(driver, 0) * 2 if same else devices(driver, 0, 0)
    stream, other = capturing.stream(), closing.stream()
    mine = capturing.empty((8,), np.float32)
    tensor, spare = used(closing, other), closing.stream()
    with other.capture() as capture:
        tensor.write(random(8), other)
    graph = capture.finish()
    graph.replay(other)
    errors: list[BaseException] = []

    def close() -> None:
        try:
            for thing in (graph, tensor, spare):
                thing.close()
        except BaseException as error:
            errors.append(error)

    with stream.capture() as capture:
        mine.write(random(8), stream)
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        assert held(driver)["executable"] == 1  # not yet
    assert not errors
    assert held(driver) == {"memory": 1, "pinned": 1, "graph": 1}  # what this capture holds, and no more
    capture.finish().close()
    mine.close()
    assert held(driver) == {}


def test_captures_on_one_gpu_do_not_keep_what_another_frees() -> None:
    driver = SimulatedDriver(gpus=2)
    first, second = devices(driver, 0, 1)
    stream, tensor = first.stream(), second.empty((8,), np.float32)
    with stream.capture():
        tensor.close()
        assert driver.live["memory"] == 0


def test_closing_waits_for_its_own_streams_and_no_others() -> None:
    driver = SimulatedDriver()
    mine, others = devices(driver, 0, 0)
    stream, second, foreign = mine.stream(), mine.stream(), others.stream()
    tensor = used(mine, stream)
    for queue, label in ((second, "mine"), (foreign, "foreign")):
        driver.launch(queue.handle, lambda: None, label)
    tensor.close()
    assert driver.launched == ["mine"]


def test_a_plan_that_is_closed_during_a_capture_goes_with_the_capture_s_end(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"), driver)
    x, y = (backend.device.empty((2, 8), np.float32) for _ in "xy")
    engine, stream = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}), backend.device.stream()
    run = engine.bind({"x": x, "y": y})
    run.enqueue(stream)
    with backend.device.stream().capture():
        engine.close()
        with pytest.raises(EngineError, match="engine first is closed"):
            run.enqueue(stream)
        assert driver.live["memory"] == 4  # x, y, an output nobody wants, scratch
    assert driver.live["memory"] == 2
    np.testing.assert_array_equal(y.read(stream).shape, (2, 8))


def test_runs_that_onnxruntime_may_capture_are_not_disturbed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    backend = onnxruntime_backend(monkeypatch, driver, graphs="onnxruntime")
    x, y, unrelated = (backend.device.empty((2, 8), np.float32) for _ in "xyz")
    engine, stream = backend.open(bundle, bundle.graph("first")), backend.device.stream()
    run, seen = engine.bind({"x": x, "y": y}), []
    x.write(random(2, 8), stream)
    real = engine.run

    def while_running(*arguments: Any) -> None:
        unrelated.close()
        seen.append(driver.live["memory"])
        real(*arguments)

    monkeypatch.setattr(engine, "run", while_running)
    run.enqueue(stream)
    assert (seen, driver.live["memory"]) == ([3], 2)


@pytest.mark.parametrize("call", ["cuGraphInstantiate", "cuGraphUpload", "cuStreamEndCapture"])
def test_a_capture_that_becomes_no_graph_gives_everything_back(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    driver = SimulatedDriver()
    (device,) = devices(driver, 0)
    stream, tensor = device.stream(), device.empty((8,), np.float32)
    before = held(driver)
    with monkeypatch.context() as patch:
        if call == "cuStreamEndCapture":
            patch.setattr(driver, "_cuStreamEndCapture", lambda stream: driver._cuStreamEndCapture_failing(stream))
            patch.setattr(driver, "_cuStreamEndCapture_failing", end_badly(driver), raising=False)
        else:
            failing(patch, driver, call)
        with pytest.raises(EngineError, match="out of memory"):
            with stream.capture() as capture:
                tensor.write(random(8), stream)
            capture.finish()
    assert held(driver) == before
    tensor.write(random(8, seed=1), stream)
    np.testing.assert_array_equal(tensor.read(stream), random(8, seed=1))


def end_badly(driver: SimulatedDriver) -> Callable[[int], int]:
    def end(stream: int) -> int:
        driver._captures.pop(stream)
        raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)

    return end


@pytest.mark.parametrize("what", ["memory", "context"])
def test_a_binding_that_fails_half_way_gives_back_what_it_made(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"), driver)
    x = backend.device.empty((2, 8), np.float32)
    engine, before = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}), held(driver)
    with monkeypatch.context() as patch:
        if what == "memory":
            failing(patch, driver, "cuMemAlloc", at=2)  # two outputs that nobody wants
        else:
            patch.setattr(engine._loaded, "context", lambda profile: engine._loaded.device.activate().cuMemFree(1))
        with pytest.raises(EngineError):
            engine.bind({"x": x})
    assert held(driver) == before
    engine.bind({"x": x})
    gc.collect()
    assert held(driver) == before  # and a binding that is dropped gives its own back


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_driver_that_fails_while_a_binding_is_forgotten_says_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"), driver)
    engine, stream = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}), backend.device.stream()
    unheard: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", unheard.append)
    x = backend.device.empty((2, 8), np.float32)
    bound = engine.bind({"x": x})
    bound.enqueue(stream)
    stream.synchronize()
    with monkeypatch.context() as patch:
        failing(patch, driver, "cuMemFree", at=at)  # two outputs that nobody wants, and scratch
        del bound
        gc.collect()
    assert not unheard


def test_what_cannot_be_opened_keeps_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    for call, opens in (
        ("cuMemGetInfo", lambda: devices(driver, 0)),
        ("cuStreamCreate", lambda: onnxruntime_backend(monkeypatch, driver)),
    ):
        with monkeypatch.context() as patch:
            real = getattr(driver, f"_{call}")
            patch.setattr(driver, f"_{call}", no_memory_once(real))
            with pytest.raises(EngineError, match="out of memory"):
                opens()
        assert driver.live["context"] == 0


def no_memory_once(real: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[None] = []

    def call(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return real(*arguments)

    return call


def test_one_failure_does_not_keep_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    (device,) = devices(driver, 0)
    stream, tensors = device.stream(), [device.empty((8,), np.float32) for _ in range(3)]
    tensors += [used(device, stream)]
    failing(monkeypatch, driver, "cuMemFree")
    with pytest.raises(EngineError, match="out of memory"), device.stream().capture():
        for tensor in tensors:
            tensor.close()
    assert held(driver) == {"memory": 1, "graph": 1}


def test_bindings_share_the_scratch_memory_of_the_largest(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"), driver)
    stream, bound = backend.device.stream(), []
    for rows in (2, 64):  # the smaller runs first, when both needs are known
        x, y = (backend.device.empty((rows, 8), np.float32) for _ in "xy")
        engine = backend.open(bundle, bundle.graph("first"), {"x": (rows, 8)})
        bound.append(engine.bind({"x": x, "y": y}))
    bound[0].enqueue(stream)
    before = driver.live["memory"]
    bound[1].enqueue(stream)
    assert driver.live["memory"] == before


def test_a_closed_plan_is_let_go_of_once_its_work_is_done(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimulatedDriver()
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"), driver)
    engine = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)})
    loaded, kept = engine._loaded, []

    def release(free: Callable[[Any], None]) -> None:
        kept.append(sys.getrefcount(plan))
        free(None)
        kept.append(sys.getrefcount(plan))

    plan = loaded._engine
    monkeypatch.setattr(backend.device, "release", release)
    engine.close()
    assert len(kept) == 2 and kept[1] < kept[0]  # it goes inside the release, not before
