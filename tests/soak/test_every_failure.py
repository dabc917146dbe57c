"""One failure at every call that can fail: one clear error, nothing left behind, the next request right."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.device import Device
from latentrt.engines.errors import EngineError, LatentRTError, StorageError
from latentrt.engines.host import HostDevice, HostStream
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeBinding
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline
from latentrt.runtime.cli.pictures import PictureWriter, Target

from ..engines import simulated_backends
from ..engines.failures import OF_THE_LIBRARY, Nth, broken, no_memory
from ..engines.simulated_backends import tensorrt_backend
from ..engines.simulated_cuda import SimulatedDriver

pytestmark = pytest.mark.slow

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 5, "height": 32, "width": 32}
PICTURE = np.full((32, 32, 3), 200, np.uint8)
"""Even and odd steps run as they are, are captured, and are replayed."""


def one_line(error: LatentRTError) -> None:
    assert str(error).isprintable() and len(str(error)) > 10, repr(error)


def draw(pipe: Pipeline, picture: Any) -> Any:
    return np.asarray(pipe(**REQUEST, image=picture).images[0])


def forget(pipe: Pipeline) -> None:
    """Let go of every shape, so that the next request makes everything anew."""
    pipe.session._shrink(room=pipe.session.kept)


def survives_every_failure(
    pipe: Pipeline, nth: Nth, held: Callable[[], object], *, picture: Any = None, stride: int = 1
) -> int:
    """Let every call of a request fail in turn, or every `stride`-th, and return how many there are."""
    expected = draw(pipe, picture)
    forget(pipe)
    before, number = held(), 1
    while True:
        nth.armed(number)
        try:
            drawn = draw(pipe, picture)
        except LatentRTError as error:
            assert isinstance(error, EngineError), error
            one_line(error)
        else:
            assert np.array_equal(drawn, expected), number
            if nth.calls < number:
                made = nth.calls
                nth.quiet()  # closing the pipeline makes calls too
                return made
        nth.quiet()
        assert np.array_equal(draw(pipe, picture), expected), number
        forget(pipe)
        assert held() == before, number
        number += stride


ON_THE_GPU = {
    "memory": ["_cuMemAlloc"],
    "pinned memory": ["_cuMemHostAlloc"],
    "captures": ["_cuStreamBeginCapture"],
    "graphs": ["_cuGraphInstantiate", "_cuGraphUpload", "_cuGraphLaunch"],
    "events": ["_cuEventCreate", "_cuEventRecord", "_cuStreamWaitEvent", "_cuEventSynchronize"],
    "copies": ["_cuMemcpyHtoDAsync", "_cuMemcpyDtoHAsync", "_cuStreamSynchronize"],
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("plans"))


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver()


@pytest.fixture
def gpu(plans: EngineCache, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    backend = tensorrt_backend(monkeypatch, plans, driver)
    with Pipeline(Bundle.open(BUNDLE), backend) as pipe:
        yield pipe
    backend.device.close()
    assert not +driver.live


def held_by(driver: SimulatedDriver, device: Device) -> Callable[[], object]:
    kinds = ("memory", "pinned", "graph", "executable", "stream", "context")
    return lambda: ({kind: driver.live[kind] for kind in kinds}, device.tensor_bytes())


@pytest.mark.parametrize("picture", [None, PICTURE], ids=["text", "picture"])
@pytest.mark.parametrize("calls", ON_THE_GPU.values(), ids=ON_THE_GPU)
def test_every_call_of_the_driver(
    gpu: Pipeline, driver: SimulatedDriver, calls: list[str], picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nth = Nth(no_memory)
    for call in calls:
        monkeypatch.setattr(driver, call, nth.instead_of(getattr(driver, call)), raising=False)
    stride = 7 if calls in (ON_THE_GPU["events"], ON_THE_GPU["copies"]) else 1
    held = held_by(driver, gpu.backend.device)
    assert survives_every_failure(gpu, nth, held, picture=picture, stride=stride) >= 2


def test_every_end_of_a_capture(gpu: Pipeline, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that was broken ends: its stream is in capture mode no more."""
    nth, end = Nth(lambda: False), driver._cuStreamEndCapture
    whole = nth.instead_of(lambda: True)

    def ending(stream: int) -> int:
        driver._captures[stream].valid = whole()
        return end(stream)

    monkeypatch.setattr(driver, "_cuStreamEndCapture", ending, raising=False)
    assert survives_every_failure(gpu, nth, held_by(driver, gpu.backend.device)) == 2


@pytest.mark.parametrize("what", OF_THE_LIBRARY)
def test_every_call_of_the_library(
    gpu: Pipeline, driver: SimulatedDriver, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, failure = OF_THE_LIBRARY[what]
    nth, kind = Nth(failure), simulated_backends.Context
    monkeypatch.setattr(kind, call, nth.instead_of(getattr(kind, call)))
    assert survives_every_failure(gpu, nth, held_by(driver, gpu.backend.device), picture=PICTURE) >= 6


ON_THE_HOST: dict[str, tuple[type, str]] = {
    "memory": (HostDevice, "empty"),
    "bind": (OnnxRuntimeEngine, "bind"),
    "addresses": (OnnxRuntimeEngine, "addresses"),
    "enqueue": (OnnxRuntimeBinding, "enqueue"),
    "runs": (OnnxRuntimeEngine, "run"),
    "captures": (HostStream, "capture"),
    "points": (HostStream, "record"),
}


@pytest.mark.parametrize("low_memory", [False, True], ids=["engines stay", "low memory"])
@pytest.mark.parametrize("what", ON_THE_HOST)
def test_every_call_on_the_host(
    what: str, low_memory: bool, plans: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, call = ON_THE_HOST[what]
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, cache=plans, low_memory=low_memory) as pipe:
        nth, device = Nth(broken), pipe.backend.device
        monkeypatch.setattr(kind, call, nth.instead_of(getattr(kind, call)))
        assert survives_every_failure(pipe, nth, device.tensor_bytes, picture=PICTURE) >= 2
    assert device.tensor_bytes() == 0


def full() -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def of_writing(nth: Nth, patch: pytest.MonkeyPatch) -> None:
    """Let what makes and changes files count."""
    for name in ("mkdir", "rename", "replace", "link", "fsync", "chmod"):
        patch.setattr(os, name, nth.instead_of(getattr(os, name)))
    opened, made = io.open, os.open

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        ordinary = opened if mode in ("r", "rb") else nth.instead_of(opened)
        return ordinary(file, mode, *arguments, **options)

    def open_handle(path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        ordinary = nth.instead_of(made) if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else made
        return ordinary(path, flags, *arguments, **options)

    patch.setattr(io, "open", open_file)
    patch.setattr(os, "open", open_handle)


@pytest.mark.parametrize(("missing", "output"), [("step-*", "one.png"), (None, "one.png"), (None, "pictures")])
def test_every_write_of_a_request(missing: str | None, output: str, tmp_path: Path) -> None:
    """What a request writes is its picture, and an engine where one is missing."""
    request = {**REQUEST, "num_inference_steps": 1}

    def drawn(root: Path, place: Path) -> Path:
        with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, cache=EngineCache(root)) as pipe:
            with PictureWriter(Target.of(place, 1), {}) as writer:
                pipe(**request, on_batch=writer)
            return Path(writer.entries()[0]["path"])

    complete = tmp_path / "complete"
    picture = drawn(complete, tmp_path / "expected.png").read_bytes()
    number, nth, errors = 0, Nth(full), 0
    while True:
        number += 1
        root, place = tmp_path / f"engines-{number}", tmp_path / f"out-{number}" / output
        shutil.copytree(complete, root)
        if missing is not None:
            (engine,) = root.glob(missing)
            shutil.rmtree(engine)
        with pytest.MonkeyPatch.context() as patch:
            of_writing(nth, patch)
            nth.armed(number)
            try:
                drawn(root, place)
            except LatentRTError as error:
                errors += 1
                assert isinstance(error, StorageError), error
                one_line(error)
        if nth.calls < number:
            break
        written = [file for file in place.parent.rglob("*") if file.is_file()]
        assert all(file.read_bytes() == picture for file in written), (number, written)
        assert drawn(root, place).read_bytes() == picture
        assert EngineCache(root).verify() == {}
        left = [file.name for file in (*place.parent.rglob(".*"), *(root / ".building").glob("*"))]
        assert left == [], number
        shutil.rmtree(root)
        shutil.rmtree(place.parent)
    assert errors > 3
