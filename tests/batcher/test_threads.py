"""Many threads, warm-up beside requests, closing whatever goes on, and forks."""

from __future__ import annotations

import atexit
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import (
    BundleError,
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestError,
    StorageError,
)
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.loop.session import Session
from latentrt.runtime.loop.workspace import BoundGraph

from .conftest import Gate

TINY: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent", "prompt": "a star"}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("latentrt")]


def storm(batcher: Batcher, requests: list[dict[str, Any]], expected: list[Any], count: int, each: int) -> None:
    """Let threads submit, cancel, ask and give up; every result is right, and everything is accounted for."""

    def user(number: int) -> int:
        choose, drawn = random.Random(number), 0
        for _ in range(each):
            which = choose.randrange(len(requests))
            try:
                future = batcher.submit(
                    **requests[which],
                    timeout=choose.choice((None, 1000.0, 1e-3)),
                    on_event=choose.choice((None, lambda event: None)),
                    previews=choose.randint(0, 3),
                )
            except (QueueFullError, DeadlineError):
                continue
            assert future.progress().images == 1 and batcher.stats().slots == 3
            if choose.random() < 0.3:
                time.sleep(choose.random() * 0.01)
                future.cancel()
            try:
                np.testing.assert_array_equal(future.result(300).images, expected[which])
                drawn += 1
            except (CancelledError, DeadlineError):
                pass
        return drawn

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(user, range(count))) > 0


def stormy(pipe: Pipeline, count: int, each: int) -> None:
    requests = [
        {
            **TINY,
            "seed": seed,
            "num_inference_steps": 2 + seed,
            "guidance_scale": 1.0 + seed % 2 * 3,
            "sampler": sampler,
        }
        for seed, sampler in enumerate(("euler", "euler_a", "unipc", "dpmpp_2m"))
    ]
    held = pipe.backend.device.tensor_bytes()
    with Batcher(pipe, slots=3, fixed_rows=True, max_waiting=6) as batcher:
        expected = [batcher.submit(**request).result(300).images for request in requests]
        storm(batcher, requests, expected, count, each)
    stats = batcher.stats()
    assert (stats.waiting, stats.running, stats.failed) == (0, 0, {})
    assert stats.submitted == stats.finished + stats.cancelled + stats.too_late
    assert pipe.backend.device.tensor_bytes() == held and threads() == []


def test_threads_that_submit_and_cancel(pipe: Pipeline) -> None:
    stormy(pipe, count=8, each=5)


@pytest.mark.slow
def test_many_threads_that_submit_and_cancel(pipe: Pipeline) -> None:
    for _ in range(5):
        stormy(pipe, count=8, each=20)


@pytest.mark.parametrize("cancel", [False, True])
def test_a_batcher_is_closed_while_threads_submit(pipe: Pipeline, cancel: bool) -> None:
    batcher, futures = Batcher(pipe, slots=2), []
    started = threading.Barrier(5)

    def user() -> None:
        started.wait(60)
        with pytest.raises(EngineError, match="the batcher is closed: open another one"):
            while True:
                try:
                    futures.append(batcher.submit(**TINY, num_inference_steps=2, on_event=lambda event: None))
                except QueueFullError:
                    time.sleep(1e-3)

    users = [threading.Thread(target=user) for _ in range(4)]
    closers = [threading.Thread(target=batcher.close, kwargs={"cancel": cancel}) for _ in range(2)]
    for thread in users:
        thread.start()
    started.wait(60)
    while not futures and all(thread.is_alive() for thread in users):
        time.sleep(0.01)
    for thread in (*closers, *users):
        if thread in closers:
            thread.start()
    for thread in (*closers, *users):
        thread.join(300)
        assert not thread.is_alive()
    assert futures and all(future.done() for future in futures)
    assert threads() == []


def test_a_batcher_is_closed_whole_on_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    freed, unregistered = list[BoundGraph](), list[Callable[..., object]]()

    def lost(bound: BoundGraph) -> None:
        freed.append(bound)
        raise EngineError("the device is lost")

    batcher = Batcher(ensure_bundle(), slots=1, backend="onnxruntime-cpu", threads=1)
    for height in (32, 40):
        batcher.submit(f"{height} stars", height=height, width=32, num_inference_steps=1).result(300)
    kept = [bound for pool in batcher._queue.pools.values() for bound in pool.opened().encoder._bound.values()]
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="the device is lost"):
        patch.setattr(BoundGraph, "close", lost)
        patch.setattr(atexit, "unregister", unregistered.append)
        batcher.close()
    assert len(kept) == 4 and {*map(id, freed)} == {*map(id, kept)}
    assert unregistered == [batcher._at_exit]
    with pytest.raises(EngineError, match="the pipeline is closed"):
        batcher.pipe("a star")


def test_a_bundle_is_closed_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start, close, closed = threading.Thread.start, Pipeline.close, list[Pipeline]()

    def full(thread: threading.Thread) -> None:
        if thread.name == "latentrt batcher":
            raise RuntimeError("can't start new thread")
        start(thread)

    def closing(pipe: Pipeline) -> None:
        closed.append(pipe)
        close(pipe)

    monkeypatch.setattr(threading.Thread, "start", full)
    monkeypatch.setattr(Pipeline, "close", closing)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Batcher(ensure_bundle(), slots=1, backend="onnxruntime-cpu", threads=1)
    assert len(closed) == 1


def test_a_batcher_is_closed_while_it_warms_up(pipe: Pipeline) -> None:
    batcher, reached, errors = Batcher(pipe, slots=2), threading.Event(), list[BaseException]()

    def warm() -> None:
        try:
            batcher.warm_up([(32, 32), (40, 40)], progress=lambda *_: reached.set())
        except EngineError as error:
            errors.append(error)

    held = pipe.backend.device.tensor_bytes()
    thread = threading.Thread(target=warm)
    thread.start()
    assert reached.wait(60)
    batcher.close()
    thread.join(300)
    assert not thread.is_alive() and [str(error) for error in errors] == ["the batcher is closed: open another one"]
    assert pipe.backend.device.tensor_bytes() == held


def test_warm_up_leaves_a_first_request_nothing_to_open_or_bind(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    with Batcher(pipe, slots=2, rows=4) as batcher:
        batcher.warm_up([(32, 32)], progress=lambda *what: told.append(what))
        assert batcher.stats().curve.keys() == {1, 2, 3, 4} and min(batcher.stats().curve.values()) > 0
        assert batcher.stats().steps == {}
        monkeypatch.setattr(OnnxRuntimeEngine, "bind", lambda *_: pytest.fail("an engine was bound"))
        picture = np.full((32, 32, 3), 0.5, np.float32)
        futures = [batcher.submit(**TINY, num_inference_steps=3, image=image) for image in (None, picture, picture)]
        assert all(len(future.result(300).images) == 1 for future in futures)
    assert [done for _, done, _ in told] == list(range(8)) and {total for *_, total in told} == {7}
    steps = [f"steps of {rows} rows" for rows in (4, 3, 2, 1)]
    stages = ("prompt and decoder", "encoder of pictures", *steps, "times of steps", "ready")
    assert [what for what, *_ in told] == [f"32x32: {what}" for what in stages]


def test_warm_up_beside_images_in_flight_does_not_touch_them(pipe: Pipeline) -> None:
    requests = [{**TINY, "seed": seed, "num_inference_steps": 60, "sampler": "unipc"} for seed in (1, 2)]
    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        futures = [batcher.submit(**request) for request in requests]
        while min(future.progress().done for future in futures) == 0:
            time.sleep(0.001)
        batcher.warm_up([(32, 32)])
        assert max(future.progress().done for future in futures) < 60
        found = [future.result(300).images for future in futures]
        for request, images in zip(requests, found, strict=True):
            np.testing.assert_array_equal(batcher.submit(**request).result(300).images, images)


def test_sizes_that_were_warmed_up_stay(pipe: Pipeline) -> None:
    sizes = [(32, 32 + 8 * number) for number in range(6)]
    with Batcher(pipe, slots=1, rows=2) as batcher:
        batcher.warm_up(sizes, pictures=False)
        for height in range(80, 128, 8):
            batcher.submit(**{**TINY, "height": height}, num_inference_steps=1).result(300)
        found = {(size.width, size.height) for size in batcher.stats().sizes}
        assert set(sizes) <= found and len(found) == 6 + 4


def test_a_failing_warm_up_leaves_nothing_behind(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(pipe, slots=2) as batcher:
        held = pipe.backend.device.tensor_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "step", lambda *_: (_ for _ in ()).throw(EngineError("the device had enough")))
            with pytest.raises(EngineError, match="the device had enough"):
                batcher.warm_up([(32, 32)], pictures=False)
        assert pipe.backend.device.tensor_bytes() == held
        with pytest.raises(RequestError, match="height is 33"):
            batcher.warm_up([(32, 33)])
        assert batcher.submit(**TINY, num_inference_steps=2).result(300)


@pytest.mark.parametrize("what", ["memory", "progress"])
def test_a_warm_up_that_cannot_be_leaves_images_in_flight(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: Any) -> Any:
        raise EngineError("there is none left")

    with Batcher(pipe, slots=1) as batcher:
        future = batcher.submit(**TINY, num_inference_steps=4)
        gate.run(2)
        message = "no memory beside their slots" if what == "memory" else "there is none left"
        with monkeypatch.context() as patch, pytest.raises(EngineError, match=message):
            patch.setattr(Session, "request", lambda _: nullcontext())  # the next turn has it, and waits at the gate
            patch.setattr(Slots, "parking", fail)
            batcher.warm_up([(32, 32)], progress=fail if what == "progress" else lambda *_: None)
        assert batcher.running == 1 and future.progress().done == 2
        gate.open()
        assert len(future.result(300).images) == 1


def test_a_warm_up_that_cannot_copy_images_out_ends_their_requests(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Batcher(pipe, slots=1) as batcher:
        future = batcher.submit(**TINY, num_inference_steps=4)
        gate.run(2)
        with monkeypatch.context() as patch, pytest.raises(EngineError, match="a copy failed"):
            patch.setattr(Session, "request", lambda _: nullcontext())  # the next turn has it, and waits at the gate
            patch.setattr(Slots, "park", lambda *_: (_ for _ in ()).throw(EngineError("a copy failed")))
            batcher.warm_up([(32, 32)])
        assert isinstance(future.exception(300), EngineError)
        gate.open()
        assert batcher.submit(**TINY, num_inference_steps=2).result(300)


def in_a_fork(work: Callable[[], None]) -> int:
    """Run something in a fork of this process and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_refuses_a_batcher_and_leaves_it_alone(pipe: Pipeline) -> None:
    with Batcher(pipe, slots=1) as batcher:
        future = batcher.submit(**TINY, num_inference_steps=40)

        def child() -> None:
            for ask in (
                lambda: batcher.submit(**TINY),
                batcher.stats,
                future.progress,
                lambda: batcher.warm_up([(32, 32)]),
            ):
                with pytest.raises(EngineError, match=r"of which this is a fork: open one here|a fork of it"):
                    ask()
            batcher.close()

        assert in_a_fork(child) == 0
        assert len(future.result(300).images) == 1


def test_a_watchdog_sees_a_turn_that_does_not_end(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step, entered, go_on = Slots.step, threading.Event(), threading.Event()

    def stuck(slots: Slots, bucket: int) -> None:
        entered.set()
        assert go_on.wait(300)
        step(slots, bucket)

    monkeypatch.setattr(Slots, "step", stuck)
    with Batcher(pipe, slots=1) as batcher:
        assert batcher.stuck_seconds == 0.0
        future = batcher.submit(**TINY, num_inference_steps=1)
        assert entered.wait(300)
        before = batcher.stuck_seconds
        time.sleep(0.02)
        assert batcher.stuck_seconds >= before + 0.02
        go_on.set()
        assert future.result(300)
        while batcher.stuck_seconds:
            time.sleep(0.001)


def test_failures_in_a_row_are_counted_until_a_step_works(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(pipe, slots=1) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "step", lambda *_: (_ for _ in ()).throw(EngineError("the device had enough")))
            for number in (1, 2, 3):
                assert isinstance(batcher.submit(**TINY, num_inference_steps=2).exception(300), EngineError)
                assert batcher.failures_in_a_row == batcher.stats().failures_in_a_row == number
        for error in (StorageError("the disk is full"), BundleError("a file was changed")):  # no fault of the device
            with monkeypatch.context() as patch:
                patch.setattr(Slots, "step", lambda *_, error=error: (_ for _ in ()).throw(error))
                assert batcher.submit(**TINY, num_inference_steps=2).exception(300) is error
                assert batcher.failures_in_a_row == 3
        assert batcher.submit(**TINY, num_inference_steps=2).result(300)
        assert batcher.failures_in_a_row == 0


def test_memory_that_a_size_never_had_is_no_failure_of_the_engine(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, request = EngineError("CUDA_ERROR_OUT_OF_MEMORY"), {**TINY, "num_inference_steps": 2}

    def fail(*_: Any, **__: Any) -> None:
        raise full

    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        with monkeypatch.context() as patch:
            for method, count in (("step", 1), ("step", 2), ("__init__", 1)):
                patch.setattr(Slots, method, fail)
                futures = [batcher.submit(**request) for _ in range(count)]
                gate.run(1)
                assert [future.exception(60) for future in futures] == [full] * count
        assert batcher.failures_in_a_row == 0
        batcher.warm_up([(32, 32)], pictures=False)  # it fits
        gate.open()
        monkeypatch.setattr(Slots, "step", fail)
        assert batcher.submit(**request).exception(60) is full
        assert batcher.failures_in_a_row == 1


def test_a_request_for_several_images_that_fail_is_a_failure(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slots, "step", lambda *_: (_ for _ in ()).throw(EngineError("the device had enough")))
    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        future = batcher.submit(**TINY, num_inference_steps=2, num_images_per_prompt=2)
        gate.run(1)
        assert isinstance(future.exception(60), EngineError) and batcher.failures_in_a_row == 1
