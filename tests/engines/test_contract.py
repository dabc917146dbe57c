"""What every device and every backend must do: one module however long, so that all of it runs on all of them.

The GPU backends also run here on a simulated driver, which executes their own code for memory, order and capture with
ONNX Runtime's CPU kernels; that says nothing about CUDA or TensorRT. On a GPU the same tests run with `-m gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.backends import Backend, open_backend, unavailable_reasons
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver, unavailable_reason
from latentrt.engines.device import Array, Device, Stream, Tensor
from latentrt.engines.engine import Engine
from latentrt.engines.errors import EngineError, ShapeError
from latentrt.engines.host import HostDevice

from .simulated_backends import onnxruntime_backend, tensorrt_backend
from .simulated_cuda import SimulatedDriver
from .small_bundles import WEIGHT, linear_bundle

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
BACKENDS = ["onnxruntime-cpu", "simulated tensorrt", "simulated onnxruntime-cuda"]
DEVICES = ["host", "simulated cuda", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "host":
        yield HostDevice()
        return
    if request.param == "cuda" and (reason := unavailable_reason()):
        pytest.skip(reason)
    gpu = CudaDevice(0, Driver(SimulatedDriver()) if request.param == "simulated cuda" else None)
    yield gpu
    gpu.close()


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS)])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    cache = EngineCache(tmp_path / "cache")
    if request.param == "simulated tensorrt":
        return tensorrt_backend(monkeypatch, cache)
    if request.param == "simulated onnxruntime-cuda":
        return onnxruntime_backend(monkeypatch, cache, graphs="ours")
    if reason := unavailable_reasons()[request.param]:
        pytest.skip(reason)
    return open_backend(request.param, cache=cache)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return linear_bundle(tmp_path / "bundle")


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# devices


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 1, 7)], ids=str)
def test_what_is_written_is_read(device: Device, dtype: str, shape: tuple[int, ...]) -> None:
    array = (random(*shape) * 100).astype(dtype)
    stream, tensor = device.stream(), device.empty(shape, dtype)
    tensor.write(array, stream)
    read = tensor.read(stream)
    assert read.dtype == array.dtype and read.shape == shape
    np.testing.assert_array_equal(read, array)
    tensor.close()


def test_an_array_may_change_after_it_was_written_and_a_tensor_after_it_was_read(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    first, second = random(4), random(4, seed=1)
    array = first.copy()
    tensor.write(array, stream)
    array[:] = 0
    read = tensor.read(stream)
    tensor.write(second, stream)
    tensor.write(first, stream)
    tensor.write(second, stream)
    np.testing.assert_array_equal(tensor.read(stream), second)
    np.testing.assert_array_equal(read, first)
    tensor.close()


def test_a_strided_array_is_written_in_order(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((3, 4), np.float32)
    array = random(4, 3).T
    tensor.write(array, stream)
    np.testing.assert_array_equal(tensor.read(stream), array)
    tensor.close()


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float32), np.zeros((2,), np.float64)], ids=["shape", "dtype"])
def test_an_array_that_does_not_fit_is_refused(device: Device, array: Array) -> None:
    tensor = device.empty((2,), np.float32)
    with pytest.raises(ShapeError, match=r"cannot write float(32|64)\[2.*\] to float32\[2\]"):
        tensor.write(array, device.stream())
    tensor.close()


def test_memory_is_counted_and_given_back_once(device: Device) -> None:
    before = device.tensor_bytes()
    tensors = [device.empty((16, 16), dtype) for dtype in ("float32", "float16")]
    assert device.tensor_bytes() - before == 16 * 16 * 6
    assert all(tensor.pointer % 64 == 0 for tensor in tensors)
    for tensor in (*tensors, *tensors):
        tensor.close()
    assert device.tensor_bytes() == before


def test_events_measure_time_in_stream_order(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((256, 1024), np.float32)
    before = stream.record()
    tensor.write(random(256, 1024), stream)
    after = stream.record()
    after.synchronize()
    assert 0 <= after.milliseconds_since(before) < 10_000
    assert after.milliseconds_since(before) == pytest.approx(-before.milliseconds_since(after))
    tensor.close()


def test_a_capture_runs_nothing_until_it_is_replayed(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    first, captured = random(4), random(4, seed=1)
    tensor.write(first, stream)
    with stream.capture() as capture:
        tensor.write(captured, stream)
    graph = capture.finish()
    np.testing.assert_array_equal(tensor.read(stream), first)
    for _ in range(2):
        tensor.write(first, stream)
        graph.replay(stream)
        np.testing.assert_array_equal(tensor.read(stream), captured)
    graph.close()
    graph.close()
    with pytest.raises(EngineError, match="closed graph"):
        graph.replay(stream)
    tensor.close()


def test_what_waits_is_refused_inside_a_capture_and_the_stream_survives(device: Device) -> None:
    stream, tensor = device.stream(), device.empty((4,), np.float32)
    for wait in (stream.synchronize, lambda: tensor.read(stream)):
        with pytest.raises(EngineError, match="while its work is being captured"), stream.capture():
            tensor.write(random(4), stream)
            wait()
    with pytest.raises(EngineError, match="already capturing"), stream.capture(), stream.capture():
        pass
    with pytest.raises(EngineError, match="inside its own block"), stream.capture() as capture:
        capture.finish()
    with pytest.raises(KeyError), stream.capture():
        raise KeyError("from the block")
    tensor.write(random(4, seed=3), stream)
    np.testing.assert_array_equal(tensor.read(stream), random(4, seed=3))
    tensor.close()
    stream.close()
    stream.close()


# engines


class Bound:
    """A graph opened for a batch, with its tensors and a binding."""

    def __init__(
        self, backend: Backend, bundle: Bundle, name: str, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        graph = bundle.graph(name)
        self.tensors = dict(tensors or {})
        self.engine: Engine = backend.open(bundle, graph, {t.name: self.tensors[t.name].shape for t in graph.inputs})
        self.run = self.engine.bind(self.tensors)


@pytest.fixture
def stream(backend: Backend) -> Stream:
    return backend.device.stream()


def tensors_of(backend: Backend, stream: Stream, batch: int = 2, **arrays: Array) -> dict[str, Tensor]:
    shapes: dict[str, Any] = {"x": (batch, 8), "y": (batch, 8), "z": (batch, 8), "total": ()}
    tensors: dict[str, Tensor] = {name: backend.device.empty(shape, np.float32) for name, shape in shapes.items()}
    tensors["order"] = backend.device.empty((batch,), np.int64)
    for name, array in arrays.items():
        tensors[name].write(array, stream)
    return tensors


def pick(tensors: Mapping[str, Tensor], names: str) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names.split()}


def close(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.close()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_engine_computes_its_graph(backend: Backend, stream: Stream, bundle: Bundle, batch: int) -> None:
    x = random(batch, 8)
    tensors = tensors_of(backend, stream, batch, x=x)
    first = Bound(backend, bundle, "first", pick(tensors, "x y total"))
    first.run.enqueue(stream)
    np.testing.assert_allclose(tensors["y"].read(stream), x @ WEIGHT, atol=1e-5)
    np.testing.assert_allclose(tensors["total"].read(stream), (x @ WEIGHT).sum(), atol=1e-4)
    first.engine.close()
    first.engine.close()
    close(tensors)


def test_engines_follow_each_other_and_read_what_is_there_when_they_run(
    backend: Backend, stream: Stream, bundle: Bundle
) -> None:
    tensors = tensors_of(backend, stream, order=np.array([1, 0]))
    chain = [
        Bound(backend, bundle, "first", pick(tensors, "x y")),  # nobody wants `total`
        Bound(backend, bundle, "second", pick(tensors, "y order z")),
    ]
    for seed in (1, 2):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        for bound in chain:
            bound.run.enqueue(stream)
        y = random(2, 8, seed=seed) @ WEIGHT
        np.testing.assert_allclose(tensors["z"].read(stream), y[[1, 0]] + y, atol=1e-5)
    for bound in chain:
        bound.engine.close()
    close(tensors)


def test_captured_engines_give_the_bits_of_eager_ones(backend: Backend, stream: Stream, bundle: Bundle) -> None:
    if not backend.can_capture:
        pytest.skip(f"{backend.name} was opened without captured graphs")
    tensors = tensors_of(backend, stream, x=random(2, 8), order=np.array([0, 0]))
    chain = [
        Bound(backend, bundle, "first", pick(tensors, "x y total")),
        Bound(backend, bundle, "second", pick(tensors, "y order z")),
    ]

    def enqueue() -> None:
        for bound in chain:
            bound.run.enqueue(stream)

    eager = {}
    for seed in (1, 2):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        enqueue()
        eager[seed] = {name: tensors[name].read(stream) for name in ("y", "z", "total")}
    with stream.capture() as capture:
        enqueue()
    graph = capture.finish()
    for seed in (1, 2, 1):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        graph.replay(stream)
        for name, expected in eager[seed].items():
            assert tensors[name].read(stream).tobytes() == expected.tobytes(), name
    graph.close()
    for bound in chain:
        bound.engine.close()
    close(tensors)


def test_what_is_written_next_does_not_reach_what_was_enqueued_before(
    backend: Backend, stream: Stream, bundle: Bundle
) -> None:
    tensors, other = tensors_of(backend, stream), tensors_of(backend, stream)
    bindings = [
        Bound(backend, bundle, "first", {"x": tensors["x"], "y": tensors["y"]}),
        Bound(backend, bundle, "first", {"x": tensors["x"], "y": other["y"]}),
    ]
    for seed, bound in enumerate(bindings):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        bound.run.enqueue(stream)
    for seed, tensor in enumerate((tensors["y"], other["y"])):
        np.testing.assert_allclose(tensor.read(stream), random(2, 8, seed=seed) @ WEIGHT, atol=1e-5)
    for bound in bindings:
        bound.engine.close()
    close(tensors)
    close(other)


def test_engines_of_different_sizes_do_not_disturb_each_other(backend: Backend, stream: Stream, bundle: Bundle) -> None:
    """The larger engine comes second and runs between a capture of the smaller one and its replay."""
    small, large = tensors_of(backend, stream, 2), tensors_of(backend, stream, 64)
    captures = backend.can_capture
    one = Bound(backend, bundle, "first", pick(small, "x y"))
    one.run.enqueue(stream)
    graph = None
    if captures:
        with stream.capture() as capture:
            one.run.enqueue(stream)
        graph = capture.finish()
    two = Bound(backend, bundle, "first", pick(large, "x y"))
    for seed in (1, 2):
        large["x"].write(random(64, 8, seed=seed), stream)
        small["x"].write(random(2, 8, seed=seed), stream)
        two.run.enqueue(stream)
        graph.replay(stream) if graph else one.run.enqueue(stream)
        np.testing.assert_allclose(large["y"].read(stream), random(64, 8, seed=seed) @ WEIGHT, atol=1e-5)
        np.testing.assert_allclose(small["y"].read(stream), random(2, 8, seed=seed) @ WEIGHT, atol=1e-5)
    if graph:
        graph.close()
    one.engine.close()
    two.engine.close()
    close(small)
    close(large)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ("y", {}, "no tensor for its input 'x'"),
        ("x y z", {}, "no input or output 'z'"),
        ("x y", {"x": ((2, 8), "float16")}, "x of graph first is float32, the tensor is float16"),
        ("x y", {"x": ((2, 7), "float32")}, "has shape"),
        ("x y", {"y": ((3, 8), "float32")}, "has shape"),
    ],
)
def test_a_binding_that_does_not_fit_is_named(
    backend: Backend, stream: Stream, bundle: Bundle, names: str, change: dict[str, Any], message: str
) -> None:
    tensors = tensors_of(backend, stream)
    engine = backend.open(bundle, bundle.graph("first"), {"x": (2, 8)})
    given = pick(tensors, names) | {name: backend.device.empty(*spec) for name, spec in change.items()}
    with pytest.raises(ShapeError, match=message):
        engine.bind(given)
    engine.close()
    close(tensors | given)


def test_a_closed_engine_says_so_and_nothing_stays_allocated(backend: Backend, bundle: Bundle) -> None:
    stream = backend.device.stream()
    before = backend.device.tensor_bytes()
    tensors = tensors_of(backend, stream, x=random(2, 8))
    bound = Bound(backend, bundle, "first", pick(tensors, "x y"))
    bound.run.enqueue(stream)
    stream.synchronize()
    bound.engine.close()
    with pytest.raises(EngineError, match="engine first is closed"):
        bound.run.enqueue(stream)
    with pytest.raises(EngineError, match="engine first is closed"):
        bound.engine.bind(pick(tensors, "x y"))
    close(tensors)
    del bound
    assert backend.device.tensor_bytes() == before


def test_an_engine_is_built_once(backend: Backend, bundle: Bundle, tmp_path: Path) -> None:
    shapes = {"x": (2, 8)}
    backend.open(bundle, bundle.graph("first"), shapes).close()
    built = {entry["folder"]: entry["key"] for entry in EngineCache(tmp_path / "cache").entries()}
    backend.open(bundle, bundle.graph("first"), shapes).close()
    assert {entry["folder"]: entry["key"] for entry in EngineCache(tmp_path / "cache").entries()} == built
