"""The CUDA device layer on a simulated driver: lifetimes, threads, errors. What a GPU does is in the contract tests."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
from latentrt.engines.cuda import context, graph, memory, stream
from latentrt.engines.cuda import device as cuda_device
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver, unavailable_reason
from latentrt.engines.errors import BackendUnavailableError, EngineError
from latentrt.engines.host import HostDevice
from latentrt.engines.tensorrt.arena import Arena

from .simulated_cuda import CUresult, SimulatedDriver

MODULES = (context, cuda_device, graph, memory, stream)


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver(total_bytes=1 << 20)


@pytest.fixture
def device(driver: SimulatedDriver) -> Iterator[CudaDevice]:
    device = CudaDevice(0, Driver(driver))
    yield device
    device.close()


def numbers(count: int = 8) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(count, dtype=np.float32)


def test_everything_is_freed_once(driver: SimulatedDriver) -> None:
    device = CudaDevice(0, Driver(driver))
    stream, tensor = device.stream(), device.empty((8,), np.float32)
    tensor.write(numbers(), stream)
    tensor.read(stream)
    stream.record().milliseconds_since(stream.record())
    with stream.capture() as capture:
        tensor.write(numbers(), stream)
    graph = capture.finish()
    graph.replay(stream)
    with pytest.raises(KeyError), stream.capture():
        tensor.write(numbers(), stream)
        raise KeyError
    for _ in range(2):
        graph.close()
        tensor.close()
        stream.close()
        device.close()
    assert not +driver.live


def test_events_are_used_again(device: CudaDevice, driver: SimulatedDriver) -> None:
    stream, tensor = device.stream(), device.empty((8,), np.float32)
    for _ in range(20):
        tensor.write(numbers(), stream)
        stream.record().synchronize()
    assert driver.live["event"] <= 3
    tensor.close()


def test_closing_waits_for_the_work_that_uses_the_memory(device: CudaDevice, driver: SimulatedDriver) -> None:
    stream, tensor = device.stream(), device.empty((8,), np.float32)
    seen = []
    pointer = tensor.pointer
    driver.launch(stream.handle, lambda: seen.append(driver.check_memory(pointer)))
    tensor.write(numbers(), stream)
    tensor.close()
    stream.synchronize()
    assert len(seen) == 1


def test_every_thread_gets_the_context(device: CudaDevice) -> None:
    results: list[object] = []

    def work() -> None:
        try:
            stream, tensor = device.stream(), device.empty((8,), np.float32)
            tensor.write(numbers(), stream)
            results.append(tensor.read(stream).tolist())
            tensor.close()
        except EngineError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [numbers().tolist()]


def test_out_of_memory_says_how_much_is_free_and_what_to_do(device: CudaDevice) -> None:
    with pytest.raises(EngineError, match=r"out of memory \(1 of 1 MiB are free\): use a smaller size or batch"):
        device.empty((1 << 20,), np.float32)
    assert device.tensor_bytes() == 0
    assert device.memory_free() == (1 << 20, 1 << 20)


def test_an_error_names_the_call_and_the_code(device: CudaDevice, driver: SimulatedDriver) -> None:
    with pytest.raises(
        EngineError, match=r"cuMemFree failed with CUDA_ERROR_INVALID_VALUE \(cuda error invalid value\)$"
    ):
        device.activate().cuMemFree(12345)
    stream = device.stream()
    driver.launch(stream.handle, lambda: driver.check_memory(1))
    with pytest.raises(EngineError, match=f"{CUresult.CUDA_ERROR_ILLEGAL_ADDRESS.name}.*start it again"):
        stream.synchronize()


def test_what_is_closed_says_so(device: CudaDevice, driver: SimulatedDriver) -> None:
    stream, tensor = device.stream(), device.empty((8,), np.float32)
    other = device.stream()
    tensor.close()
    other.close()
    for use in (lambda: tensor.write(numbers(), stream), lambda: tensor.read(stream)):
        with pytest.raises(EngineError, match="closed tensor"):
            use()
    with pytest.raises(EngineError, match="closed stream"):
        other.record()
    device.close()
    with pytest.raises(EngineError, match="closed GPU"):
        device.empty((1,), np.float32)
    with pytest.raises(EngineError, match="no GPU 1: this process sees 1"):
        CudaDevice(1, Driver(driver))


def test_a_capture_can_be_finished_once(device: CudaDevice) -> None:
    stream = device.stream()
    with stream.capture() as capture:
        pass
    capture.finish().close()
    with pytest.raises(EngineError, match="finished twice"):
        capture.finish()


def test_memory_used_is_what_was_taken_since_the_gpu_was_opened(device: CudaDevice, driver: SimulatedDriver) -> None:
    before = device.bytes_taken()
    tensor = device.empty((1 << 20,), np.uint8)
    assert 1 << 20 <= device.bytes_taken() - before < 1.01 * (1 << 20)
    tensor.close()
    assert device.bytes_taken() == before


@pytest.mark.parametrize(("number", "text"), [(12020, "12.2"), (12080, "12.8"), (13000, "13.0")])
def test_the_driver_s_version_is_written_as_nvidia_writes_it(
    device: CudaDevice, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch, number: int, text: str
) -> None:
    monkeypatch.setattr(driver, "_cuDriverGetVersion", lambda: number)
    assert device.driver_version == text


def test_the_capability_and_the_name_come_from_the_gpu(
    driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {"COMPUTE_CAPABILITY_MAJOR": 12, "COMPUTE_CAPABILITY_MINOR": 1}
    monkeypatch.setattr(
        driver, "_cuDeviceGetAttribute", lambda kind, gpu: asked[kind.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]
    )
    monkeypatch.setattr(driver, "_cuDeviceGetName", lambda length, gpu: b"NVIDIA X 1".ljust(length, b"\0"))
    device = CudaDevice(0, Driver(driver))
    assert (device.name, device.compute_capability) == ("NVIDIA X 1", "12.1")
    device.close()


@pytest.mark.skipif(unavailable_reason() is None, reason="this machine has a GPU driver")
def test_without_a_driver_the_answer_imports_nothing() -> None:
    code = """
import sys
from latentrt.engines import backends
reasons = [backends._BACKENDS[name][0]() for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")]
assert all("driver" in reason for reason in reasons), reasons
assert not {"onnx", "tensorrt", "tensorrt_rtx", "cuda.bindings", "cuda.core", "onnxruntime"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver is installed"):
        CudaDevice()


@pytest.mark.skipif(unavailable_reason() is None, reason="with a driver the contract tests make these calls for real")
def test_every_call_fits_the_bindings(
    device: CudaDevice, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a driver the bindings still check the number and types of arguments before they miss their library."""
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    calls: dict[str, tuple[object, ...]] = {}
    funnel = Driver._call

    def note(self: Driver, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        calls[name] = tuple(
            getattr(getattr(bindings, type(a).__name__), a.name) if isinstance(a, Enum) else a for a in arguments
        )
        return funnel(self, name, function, *arguments)

    monkeypatch.setattr(Driver, "_call", note)
    other = CudaDevice(0, Driver(driver))
    stream, second, tensor = other.stream(), other.stream(), other.empty((8,), np.float32)
    with stream.capture() as capture:
        tensor.write(numbers(), stream)
    graph = capture.finish()
    graph.replay(stream)
    second.follow(stream)
    tensor.rows(0, 2).copy(tensor.rows(4, 2), stream)
    tensor.read(stream)
    stream.record().milliseconds_since(stream.record())
    assert (other.compute_capability, other.driver_version, other.memory_free()[1]) == ("8.9", "13.0", 1 << 20)
    for thing in (graph, tensor, stream, second, other):
        thing.close()
    used = set(re.findall(r"\bcu[A-Z]\w+", "".join(inspect.getsource(m) for m in MODULES)))
    assert used == set(calls)
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match="driver library"):  # a TypeError would be ours
            getattr(bindings, name)(*arguments)


def test_the_largest_need_announced_makes_the_arena() -> None:
    device = HostDevice()
    arena = Arena(device)
    for need in (100, 1000, 10):
        arena.reserve(need)
    small, large = arena.block(10), arena.block(1000)
    assert small is large and device.tensor_bytes() == 1000
    arena.reserve(5000)
    larger = arena.block(5000)
    assert larger.pointer != small.pointer and device.tensor_bytes() == 6000  # who holds the old block keeps it
    del small, large
    assert device.tensor_bytes() == 5000
    assert arena.block(10) is larger
    del larger
    assert device.tensor_bytes() == 0
