"""What every backend must do: one module, so that all of it runs on all of them.

The GPU backends also run here on a simulated driver, which executes their own code for memory, order and capture with
ONNX Runtime's CPU kernels; that says nothing about CUDA or TensorRT. On a GPU the same tests run with `-m gpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from latentrt.engines.backends import Backend
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.device import Array, Stream, Tensor
from latentrt.engines.engine import Engine
from latentrt.engines.errors import EngineError, ShapeError

from .simulated_backends import ON_A_GPU, SIMULATED, backend_named
from .small_bundles import WEIGHT, random


@pytest.fixture(params=["onnxruntime-cpu", "openvino", *SIMULATED, *ON_A_GPU])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    return backend_named(request.param, monkeypatch, EngineCache(tmp_path / "cache"))


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


def chain_of(backend: Backend, bundle: Bundle, tensors: Mapping[str, Tensor], first: str) -> list[Bound]:
    """Return both graphs of the bundle, the first bound to the given tensors, the second reading what it writes."""
    names = {"first": first, "second": "y order z"}
    return [Bound(backend, bundle, name, pick(tensors, bound)) for name, bound in names.items()]


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
    chain = chain_of(backend, bundle, tensors, "x y")  # nobody wants `total`
    for seed in (1, 2):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        for bound in chain:
            bound.run.enqueue(stream)
        y = random(2, 8, seed=seed) @ WEIGHT
        np.testing.assert_allclose(tensors["z"].read(stream), y[[1, 0]] + y, atol=1e-5)
    for bound in chain:
        bound.engine.close()
    close(tensors)


def test_captured_engines_give_the_bits_of_eager_ones_or_say_that_they_cannot_be_captured(
    backend: Backend, stream: Stream, bundle: Bundle
) -> None:
    tensors = tensors_of(backend, stream, x=random(2, 8), order=np.array([0, 0]))
    chain = chain_of(backend, bundle, tensors, "x y total")

    def enqueue() -> None:
        for bound in chain:
            bound.run.enqueue(stream)

    eager = {}
    for seed in (1, 2):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        enqueue()
        eager[seed] = {name: tensors[name].read(stream) for name in ("y", "z", "total")}
    if backend.can_capture:
        with stream.capture() as capture:
            enqueue()
        graph = capture.finish()
    else:
        with pytest.raises(EngineError, match="engine first cannot be captured"), stream.capture():
            enqueue()
    for seed in (1, 2, 1):
        tensors["x"].write(random(2, 8, seed=seed), stream)
        graph.replay(stream) if backend.can_capture else enqueue()
        for name, expected in eager[seed].items():
            assert tensors[name].read(stream).tobytes() == expected.tobytes(), name
    if backend.can_capture:
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
    one = Bound(backend, bundle, "first", pick(small, "x y"))
    one.run.enqueue(stream)
    graph = None
    if backend.can_capture:
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
    def built() -> list[Path]:
        backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}).close()
        return [entry["folder"] for entry in EngineCache(tmp_path / "cache").entries()]

    first = built()
    kept = {"onnxruntime-cuda": 0, "openvino": 2}  # no engines; the graph, and what was compiled of it
    assert len(first) == kept.get(backend.name, 1)
    for folder in first:
        (folder / "note").touch()  # another build would replace the folder
    assert built() == first and all((folder / "note").exists() for folder in first)


def test_one_thread_at_a_time_holds_a_backend_as_often_as_it_likes(backend: Backend) -> None:
    got: list[bool] = []

    def take() -> None:
        got.append(backend.lock.acquire(blocking=False))
        if got[-1]:
            backend.lock.release()

    def take_in_another_thread() -> None:
        other = Thread(target=take)
        other.start()
        other.join()

    with backend.lock:
        take()
        take_in_another_thread()
    take_in_another_thread()
    assert got == [True, False, True]
