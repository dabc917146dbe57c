"""What a listener hears, in which order, and that it harms nobody; progress, counts and who observes them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.engines.errors import DeadlineError, EngineError, QueueFullError, RequestError
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import (
    Admitted,
    Batcher,
    BatchFuture,
    Drawn,
    Event,
    JobProgress,
    Observer,
    Previewed,
    Stepped,
)
from latentrt.runtime.batcher.deliver import Box, Deliverer
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.batcher.job import Job
from latentrt.runtime.result import Timings
from PIL import Image

from .conftest import Gate

SMALL: dict[str, Any] = {"height": 64, "width": 64, "prompt": "a star", "num_inference_steps": 6, "seed": 3}


@pytest.fixture
def batcher(pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe, slots=2, fixed_rows=True) as opened:
        yield opened


def of(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("end", ["done", "cancelled"])
def test_a_request_that_is_over_is_let_go_of_at_once(batcher: Batcher, end: str) -> None:
    """Without Python's search for circles, which may come minutes later: pictures are large."""
    start, found = Image.new("RGB", (64, 64), "red"), list[weakref.ref[Any]]()

    def jobs() -> int:
        return sum(type(each) is Job for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = jobs()
        future = batcher.submit(**SMALL, image=start, strength=1.0, num_images_per_prompt=2)
        if end == "cancelled":
            future.cancel()
            wait([future])
        else:
            found += [weakref.ref(future.result()), *map(weakref.ref, future.result().images)]
        while future.progress().state != end or batcher._queue.jobs:
            time.sleep(0.001)
        assert future.progress().images == 2
        found.append(weakref.ref(future))
        del future
        until = time.monotonic() + 60
        while any(each() for each in found) or jobs() > before:
            assert time.monotonic() < until, found
            time.sleep(0.01)
    finally:
        gc.enable()


def test_a_listener_hears_of_every_image_until_its_result(batcher: Batcher) -> None:
    events: list[Event] = []
    future = batcher.submit(**SMALL, num_images_per_prompt=2, on_event=events.append)
    future.add_done_callback(lambda done: events.append(done))  # type: ignore[arg-type]
    result = future.result(300)
    assert [event.index for event in of(events, Admitted)] == [0, 1]
    for index in (0, 1):
        mine = [event for event in events if getattr(event, "index", None) == index]
        assert isinstance(mine[0], Admitted) and isinstance(mine[-1], Drawn)
        steps = [(event.done, event.total) for event in of(mine, Stepped)]
        assert steps == sorted(set(steps)) and steps[-1] == (6, 6)
        assert mine[-1].seed == 3 + index and mine[-1].picture is result.images[index]
    assert events[-1] is future


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_what_is_drawn_is_what_the_request_asked_for(batcher: Batcher, output_type: str) -> None:
    events: list[Event] = []
    result = batcher.submit(**SMALL, output_type=output_type, on_event=events.append).result(300)
    np.testing.assert_array_equal(of(events, Drawn)[0].picture, result.images[0])


@pytest.mark.parametrize(("previews", "steps"), [(0, []), (1, [3]), (2, [2, 4]), (3, [2, 3, 4])])
def test_previews_come_at_even_distances(pipe: Pipeline, gate: Gate, previews: int, steps: list[int]) -> None:
    events: list[Event] = []
    heard = threading.Semaphore(0)

    def listen(event: Event) -> None:
        events.append(event)
        heard.release()

    with Batcher(pipe, slots=1, fixed_rows=True) as batcher:
        future = batcher.submit(**SMALL, previews=previews, on_event=listen)
        shown = []
        for step in range(1, 7):
            gate.run(1)
            for _ in range(1 + (step == 1) + (step in steps)):
                assert heard.acquire(timeout=60)
            shown += [step] * len(of(events[-1:], Previewed))
        assert shown == steps and [event.number for event in of(events, Previewed)] == list(range(1, previews + 1))
        assert all(event.picture.size == (64, 64) for event in of(events, Previewed))
        assert future.result(300)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.0, 0.4)},  # the last two previews are of steps without guidance
        {"guidance_interval": (0.5, 1.0)},
        {"guidance_reuse": 0.4},
    ],
    ids=str,
)
def test_previews_show_the_picture_without_the_noise_that_is_left(
    pipe: Pipeline, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    request = {**SMALL, "sampler": "euler", "output_type": "latent", **options}
    steps: list[tuple[int, Array]] = []  # timestep of each, and the latents after it

    def note(pipe: Any, step: int, timestep: float, values: dict[str, Array]) -> None:
        steps.append((round(timestep), values["latents"].copy()))

    pipe(**request, callback_on_step_end=note)
    config = pipe.bundle.manifest.scheduler
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    sigmas = [float(((1 - alphas[t]) / alphas[t]) ** 0.5) for t, _ in steps]
    shown: list[Array] = []
    decode = Encoder.decode
    monkeypatch.setattr(Encoder, "decode", lambda self, *given: shown.append(given[0]) or decode(self, *given))
    assert batcher.submit(**request, previews=3, on_event=lambda event: None).result(300)
    for done, latents in zip((2, 3, 4), shown, strict=True):
        before, after = steps[done - 2][1], steps[done - 1][1]
        slope = (after - before) / (
            sigmas[done] - sigmas[done - 1]
        )  # of Euler's method, from x to x0 = x - sigma slope
        np.testing.assert_allclose(latents, before - sigmas[done - 1] * slope, atol=2e-3)


def test_a_preview_that_cannot_be_decoded_is_left_out(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = Encoder.decode, []

    def broken(encoder: Encoder, latents: Any, decoding: Any) -> Any:
        calls.append(latents)
        if len(calls) == 1:
            raise EngineError("the decoder had enough")
        return decode(encoder, latents, decoding)

    monkeypatch.setattr(Encoder, "decode", broken)
    events: list[Event] = []
    assert batcher.submit(**SMALL, previews=1, on_event=events.append).result(300)
    assert len(calls) == 2 and not of(events, Previewed) and of(events, Drawn)


def test_a_preview_that_fails_in_any_way_ends_nobody(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "clean", lambda *_: (_ for _ in ()).throw(MemoryError("no room for a picture")))
    events: list[Event] = []
    futures = [batcher.submit(**SMALL, previews=1, on_event=events.append), batcher.submit(**SMALL)]
    assert all(len(future.result(300).images) == 1 for future in futures)
    assert not of(events, Previewed) and batcher.failures_in_a_row == 0


def test_previews_are_those_of_the_scheduler_that_a_request_came_with(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Array] = []
    preview = Encoder.preview
    monkeypatch.setattr(Encoder, "preview", lambda self, *given: shown.append(given[0]) or preview(self, *given))
    request = {**SMALL, "sampler": "euler", "previews": 1, "on_event": lambda event: None}
    with Batcher(pipe, slots=1, fixed_rows=True) as batcher:
        future = batcher.submit(**request)
        gate.run(1)
        config = {**pipe.bundle.manifest.scheduler, "prediction_type": "v_prediction"}
        pipe.scheduler = SimpleNamespace(config=config)
        try:
            gate.open()
            assert future.result(300)
        finally:
            pipe._use(pipe.bundle.manifest)
        assert batcher.submit(**request).result(300)
    np.testing.assert_array_equal(*shown)


def test_a_slow_listener_misses_steps_and_holds_nobody_up(batcher: Batcher) -> None:
    events: list[Event] = []
    entered, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        events.append(event)
        entered.set()
        assert go_on.wait(300)

    held = batcher.submit(**SMALL, on_event=slow)
    assert entered.wait(300)
    others = [batcher.submit(**SMALL) for _ in range(3)]
    for other in others:  # they have results while the listener still holds its first event
        assert other.result(300)
    assert not held.done() and len(events) == 1
    assert len(held._progress.__closure__[0].cell_contents.box.entries) <= 3  # type: ignore[attr-defined]
    go_on.set()
    assert held.result(300)
    assert [type(event) for event in events] == [Admitted, Stepped, Drawn]
    assert of(events, Stepped)[0].done == 6


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_listener_that_raises_harms_nobody(
    batcher: Batcher, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise error("a listener had enough")

    futures = [batcher.submit(**SMALL, on_event=broken), batcher.submit(**SMALL)]
    for future in futures:
        assert len(future.result(300).images) == 1
    if error is RuntimeError:
        assert [record.message for record in caplog.records] == ["on_event of a request failed"]


def test_nothing_is_heard_of_a_request_that_was_cancelled(pipe: Pipeline, gate: Gate) -> None:
    events: list[Event] = []
    go_on = threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        assert go_on.wait(300)

    with Batcher(pipe, slots=1) as batcher:
        future = batcher.submit(**SMALL, on_event=listen, previews=3)
        gate.run(3)
        future.cancel()
        gate.run(1)
        go_on.set()
        with pytest.raises(CancelledError):
            future.result(300)
    assert [type(event) for event in events] == [Admitted]


@pytest.mark.parametrize("previews", [-1, 4, True, 1.0])
def test_previews_out_of_range_are_refused(batcher: Batcher, previews: Any) -> None:
    with pytest.raises(RequestError, match=r"previews is .*: give a whole number from 0 to 3"):
        batcher.submit(**SMALL, previews=previews, on_event=print)


def test_progress_follows_a_request(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        first = batcher.submit(**{**SMALL, "num_inference_steps": 20}, num_images_per_prompt=2)
        second = batcher.submit(**{**SMALL, "num_inference_steps": 20})
        assert isinstance(first, BatchFuture) and first.seeds == [3, 4] and first.request.width == 64
        assert first.progress() == JobProgress("queued", 0, 40, 0, 2, 0, None)
        assert second.progress() == JobProgress("queued", 0, 20, 0, 1, 2, None)
        gate.run(10)
        found = first.progress()
        assert (found.state, found.done, found.position) == ("running", 10, 0)
        assert found.seconds is not None and second.progress().seconds > found.seconds > 0  # type: ignore[operator]
        gate.run(10)
        assert first.progress().images_done == 1
        assert second.progress().position == 1
        second.cancel()
        assert second.progress().state == "cancelled" and second.progress().seconds == 0
        gate.open()
        first.result(300)
        assert first.progress() == JobProgress("done", 40, 40, 2, 2, None, 0.0)


def test_progress_of_a_request_that_failed(batcher: Batcher, poison: str) -> None:
    future = batcher.submit(**{**SMALL, "prompt": poison})
    assert isinstance(future.exception(300), EngineError)
    assert future.progress().state == "failed" and future.progress().seconds == 0


class Notes(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def stepped(self, bucket: int, used: int, seconds: float) -> None:
        self.told.append(("stepped", bucket, used, seconds))

    def admitted(self, queue_seconds: float) -> None:
        self.told.append(("admitted", queue_seconds))

    def decoded(self, seconds: float) -> None:
        self.told.append(("decoded", seconds))

    def finished(self, timings: Timings) -> None:
        self.told.append(("finished", timings))

    def failed(self, error: BaseException) -> None:
        self.told.append(("failed", type(error)))

    def cancelled(self) -> None:
        self.told.append(("cancelled",))

    def rejected(self, error: BaseException) -> None:
        self.told.append(("rejected", type(error)))


def test_counts_and_observers_agree(pipe: Pipeline, poison: str, gate: Gate) -> None:
    notes = Notes()
    with Batcher(pipe, slots=2, rows=4, max_waiting=2, observer=notes) as batcher:
        cancelled = batcher.submit(**SMALL)
        with pytest.raises(QueueFullError):
            batcher.submit(**SMALL, num_images_per_prompt=2)
        with pytest.raises(RequestError):
            batcher.submit(**{**SMALL, "height": 63})
        cancelled.cancel()
        done = batcher.submit(**{**SMALL, "guidance_scale": 1.0})
        assert batcher.stats().oldest_waiting_seconds > 0
        gate.open()
        result = done.result(300)
        with pytest.raises(EngineError):
            batcher.submit(**{**SMALL, "prompt": poison}).result(300)
    found = batcher.stats()
    assert (found.waiting, found.running, found.oldest_waiting_seconds) == (0, 0, 0.0)
    assert (found.slots, found.rows, found.steps) == (2, 4, {1: 6, 2: 6})
    assert (found.rows_used, found.rows_run) == (6 + 12, 6 + 12)
    assert (found.submitted, found.admitted, found.finished, found.cancelled) == (3, 2, 1, 1)
    assert (found.rejected, found.failed, found.too_late, found.retried, found.swapped) == (
        2,
        {"EngineError": 1},
        0,
        0,
        0,
    )
    seconds = sum(note[3] for note in notes.told if note[0] == "stepped")
    assert sum(found.step_seconds.values()) == pytest.approx(seconds)
    told = {name: [note for note in notes.told if note[0] == name] for name in {note[0] for note in notes.told}}
    assert {name: len(notes) for name, notes in told.items()} == {
        **{"stepped": 12, "admitted": 2, "decoded": 1, "finished": 1, "failed": 1, "cancelled": 1, "rejected": 2}
    }
    assert told["finished"] == [("finished", result.timings)] and told["failed"] == [("failed", EngineError)]
    assert {note[1] for note in told["rejected"]} == {QueueFullError, RequestError}
    assert result.timings.total > result.timings.queue > 0


def test_an_observer_that_raises_harms_nobody(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def stepped(self, bucket: int, used: int, seconds: float) -> None:
            raise RuntimeError("an observer had enough")

    with Batcher(pipe, slots=1, observer=Broken()) as batcher:
        assert batcher.submit(**SMALL).result(300)
    assert "an observer of a batcher failed in stepped" in caplog.text


def test_of_one_key_only_the_last_is_kept_and_order_is_that_of_posting() -> None:
    deliverer, box, heard = Deliverer(), Box(), list[str]()
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait(60)

    deliverer.post(box, "first", hold)
    assert entered.wait(60)
    for number in range(100):
        deliverer.post(box, "step", lambda number=number: heard.append(f"step {number}"))
        if number == 50:
            deliverer.post(box, "preview", lambda: heard.append("preview"))
    assert len(box.entries) == 2
    deliverer.post(box, "end", lambda: heard.append("end"))
    go_on.set()
    deliverer.close()
    assert heard == ["preview", "step 99", "end"]


def test_a_thread_that_does_not_start_is_started_with_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    deliverer, heard = Deliverer(), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no new thread")))
        deliverer.post(Box(), "first", lambda: heard.append(1))
    deliverer.post(Box(), "second", lambda: heard.append(2))
    deliverer.close(60)
    assert heard == [1, 2]


@pytest.fixture
def finishers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let threads for results start from when it is set."""
    start, may = threading.Thread.start, threading.Event()

    def started(thread: threading.Thread) -> None:
        if thread.name == "latentrt finisher" and not may.is_set():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    yield may
    may.set()


def drawn_without_a_thread(batcher: Batcher) -> BatchFuture:
    future = batcher.submit(**SMALL)
    while batcher._queue.jobs:
        time.sleep(0.005)
    assert not future.done()
    return future


def test_a_result_for_which_no_thread_could_be_started_is_there_at_the_end(
    pipe: Pipeline, finishers: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with Batcher(pipe, slots=1) as batcher:
        future = drawn_without_a_thread(batcher)
    assert future.done() and len(future.result(0).images) == 1
    assert [record.message for record in caplog.records] == [
        "a thread for results did not start: can't start new thread"
    ]


def test_a_result_for_which_no_thread_could_be_started_is_there_once_one_can(
    pipe: Pipeline, finishers: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.batcher.deliver.RETRY", 0.01)
    with Batcher(pipe, slots=1) as batcher:
        future = drawn_without_a_thread(batcher)
        finishers.set()
        assert len(future.result(60).images) == 1


def test_a_deadline_that_cannot_be_met_is_refused_at_once(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        assert not batcher.submit(**SMALL, timeout=1e-3).done()  # nothing is known of steps yet
        gate.run(1)
        long = {**SMALL, "num_inference_steps": 100}
        running = batcher.submit(**long)
        gate.run(12)
        step, (pool,) = batcher.stats().curve[2], batcher._queue.pools.values()
        encode, pool.times.lately = pool.times.beside["encode"], 0.0
        with pytest.raises(DeadlineError, match=r"the request takes about \d+\.\d s from now, .* and has 0\.") as alone:
            batcher.submit(**SMALL, timeout=3 * step)
        assert alone.value.seconds == pytest.approx(6 * step + encode)
        with pytest.raises(DeadlineError) as behind:
            batcher.submit(**long, timeout=120 * step)
        assert behind.value.seconds == pytest.approx(188 * step + encode)
        assert batcher.stats().rejected == 2
        last = batcher.submit(**SMALL, timeout=1000.0)
        gate.open()
        assert last.result(300) and running.result(300)


def test_too_much_work_in_the_queue_is_refused_in_seconds(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1, rows=2, max_wait=1e-6) as batcher:
        running = batcher.submit(**{**SMALL, "num_inference_steps": 30})
        gate.run(12)
        step = batcher.stats().curve[2]
        assert batcher.stats().work_seconds == pytest.approx(18 * step), "work is left, though nothing waits"
        waiting = batcher.submit(**{**SMALL, "num_inference_steps": 30})  # nothing waits before it
        assert batcher.stats().work_seconds == pytest.approx(48 * step)
        with pytest.raises(QueueFullError, match=r"what waits takes about .* s: at most 1e-06 s may") as full:
            batcher.submit(**SMALL)
        assert full.value.seconds == pytest.approx(30 * step - 1e-6)  # until no more waits than may
        gate.open()
        assert running.result(300) and waiting.result(300)
    with pytest.raises(RequestError, match="max_wait is 0: give seconds, more than 0"):
        Batcher(pipe, max_wait=0)
