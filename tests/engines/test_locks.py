"""What threads share is touched by the one that holds its lock, seen in one thread: races themselves are rare."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.cuda import release
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver
from latentrt.engines.cuda.release import Releases, releases_of
from latentrt.engines.onnxruntime import cpu as onnxruntime_cpu
from latentrt.engines.onnxruntime import cuda as onnxruntime_cuda
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt import child

from .simulated_backends import onnxruntime_backend, tensorrt_backend
from .simulated_cuda import SimulatedDriver


def owned(lock: Any) -> bool:
    """Tell whether this thread holds a reentrant lock."""
    return bool(lock._is_owned())


def guarded(name: str, touched: list[tuple[str, bool]]) -> property:
    """Return an attribute that notes, whenever it is touched, whether the lock of its object is held."""

    def get(self: Any) -> Any:
        touched.append((name, owned(self.lock)))
        return self.__dict__[name]

    def put(self: Any, value: Any) -> None:
        if name in self.__dict__:
            touched.append((name, owned(self.lock)))
        self.__dict__[name] = value

    return property(get, put)


@pytest.mark.parametrize("fails", ["nothing", "mark", "wait"])
def test_what_waits_to_be_freed_is_touched_under_its_lock(fails: str) -> None:
    touched: list[tuple[str, bool]] = []
    names = ("_captures", "_waiting")
    watched = type("Watched", (Releases,), {name: guarded(name, touched) for name in names})
    releases: Any = watched(Driver(SimulatedDriver()))  # type: ignore[call-arg]
    freed: list[bool] = []
    failing = [fails]

    class Owner:
        def enter(self) -> Any:
            freed.append(owned(releases.lock))

        def mark(self) -> Callable[[], None]:
            assert owned(releases.lock)  # an event of a capture that begins here would be a part of it
            if "mark" in failing:
                raise RuntimeError(fails)

            def wait() -> None:
                assert not owned(releases.lock)  # others go on while this thread waits
                if "wait" in failing:
                    raise RuntimeError(fails)

            return wait

    owner = Owner()
    try:
        with releases.paused():
            releases.add(owner, lambda driver: None)
        releases.add(owner, lambda driver: None)
    except RuntimeError as error:
        assert str(error) == fails
    assert {name for name, _ in touched} == set(names)
    assert all(held for _, held in touched), touched
    assert freed == ([True, True] if fails == "nothing" else [])
    failing.clear()
    releases.add(owner, lambda driver: None)
    assert freed == [True] * (3 if fails == "nothing" else 2)  # what a failure kept goes with the next


def test_a_capture_that_begins_while_a_thread_waits_keeps_what_was_to_be_freed() -> None:
    releases, freed = Releases(Driver(SimulatedDriver())), list[str]()

    class Owner:
        def enter(self) -> Any:
            return None

        def mark(self) -> Callable[[], None]:
            return lambda: capture.enter_context(releases.paused()) if not freed else None  # type: ignore[func-returns-value]

    with ExitStack() as capture:
        releases.add(Owner(), lambda driver: freed.append("a"))
        assert not freed  # a free would break the capture
        freed.append("the capture ends")
    assert freed == ["the capture ends", "a"]


def test_two_threads_get_the_same_releases_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[threading.Thread] = []
    found: list[Releases] = []
    second_came = threading.Event()

    class Slow(Releases):
        def __init__(self, driver: Driver) -> None:
            made.append(threading.current_thread())
            if len(made) == 1:
                thread.start()
                second_came.wait(0.2)  # with the lock it cannot come
            super().__init__(driver)

    def second() -> None:
        found.append(releases_of(driver, 0))
        second_came.set()

    monkeypatch.setattr(release, "Releases", Slow)
    driver, thread = Driver(SimulatedDriver()), threading.Thread(target=second)
    first = releases_of(driver, 0)
    thread.join()
    assert found == [first] and len(made) == 1


def test_a_stream_is_taken_away_while_nobody_marks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    device, held = CudaDevice(0, Driver(driver)), list[bool]()
    real: Callable[..., Any] = driver._cuStreamDestroy

    def destroy(stream: int) -> Any:
        held.append(owned(device.releases.lock))
        return real(stream)

    monkeypatch.setattr(driver, "_cuStreamDestroy", destroy)
    device.stream().close()
    assert held == [True]


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"])
def test_an_engine_is_checked_while_no_request_runs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = {"onnxruntime-cpu": onnxruntime_cpu, "onnxruntime-cuda": onnxruntime_cuda, "tensorrt": tensorrt}[name]
    cache, held = EngineCache(tmp_path / "cache"), list[bool]()
    backend: Any
    if name == "onnxruntime-cpu":
        backend = onnxruntime_cpu.OnnxRuntimeCpu(cache=cache, threads=1)
    elif name == "tensorrt":
        backend = tensorrt_backend(monkeypatch, cache)
    else:
        backend = onnxruntime_backend(monkeypatch, cache=cache)
    real = module.accept

    def accept(*arguments: Any) -> None:
        held.append(owned(backend.lock))
        real(*arguments)

    monkeypatch.setattr(module, "accept", accept)
    backend.open(bundle, bundle.graph("first"), {"x": (2, 8)}).close()
    assert held == [True]


def test_children_that_wait_are_taken_and_kept_under_their_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    class Watched(list[Any]):
        def append(self, value: Any) -> None:
            held.append(child._lock.locked())
            super().append(value)

        def remove(self, value: Any) -> None:
            held.append(child._lock.locked())
            super().remove(value)

    class Child:
        def __init__(self, backend: str, gpu: int | None) -> None:
            self.use, self.timer = (backend, gpu), None
            self.is_alive, self.close = lambda: True, lambda: 0

    monkeypatch.setattr(child, "_idle", Watched())
    monkeypatch.setattr(child, "Child", Child)
    first = child._take("tensorrt", None)
    child._keep(first)
    timer = first.timer
    assert child._take("tensorrt", None) is first
    assert timer is not None and timer.finished.is_set()  # it would end a child that builds
    child._keep(first)
    child._end(first)
    child._end(first)
    assert held == [True] * 4 and not child._idle
