"""Bounds of the queue, sizes side by side, threads, and the end of a batcher."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import EngineError, QueueFullError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.queue import MAX_POOLS, Turns

from .conftest import Gate

SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np", "num_inference_steps": 2, "seed": 1}
STAR: dict[str, Any] = {**SMALL, "prompt": "a star"}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("latentrt")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


def test_a_full_queue_says_when_there_is_room(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1, max_waiting=2) as batcher:
        long = {**STAR, "num_inference_steps": 40}
        first = batcher.submit(**long)
        gate.run(1)
        others = [batcher.submit(**long), batcher.submit(**long)]
        with pytest.raises(QueueFullError, match="2 images of this size wait: at most 2 may; try later") as full:
            batcher.submit(**STAR)
        assert full.value.seconds is None  # no step was timed
        gate.run(10)
        (pool,) = batcher._queue.pools.values()
        pool.times.lately = 0.0
        with pytest.raises(QueueFullError, match=r"2 images .* wait, and there is room in about \d+\.\d s") as full:
            batcher.submit(**STAR)
        (size,) = batcher.stats().sizes
        left = first.progress().total - first.progress().done  # after which the first of those that wait has its slot
        assert full.value.seconds == pytest.approx(left * size.curve[2])
        assert (batcher.waiting, batcher.running) == (2, 1)
        gate.open()
        for future in (first, *others):
            future.result(300)
        assert batcher.submit(**STAR).result(300)


def test_more_images_than_may_ever_wait_are_refused(pipe: Pipeline) -> None:
    with Batcher(pipe, slots=1, max_waiting=2) as batcher, pytest.raises(RequestError, match="has 3 images: at most"):
        batcher.submit(**STAR, num_images_per_prompt=3)


def test_sizes_take_turns(pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    spend = Turns.spend
    monkeypatch.setattr(Turns, "spend", lambda turns, key, seconds: spend(turns, key, 1.0))
    with Batcher(pipe, slots=1) as batcher:
        requests = [{**STAR, "height": height, "num_inference_steps": 4} for height in (64, 72)]
        futures = [batcher.submit(**request) for request in requests]
        gate.run(6)
        assert [future.progress().done for future in futures] == [3, 3]
        gate.run(2)
        for request, future in zip(requests, futures, strict=True):
            assert np.abs(future.result(300).images - pipe(**request).images).max() <= 1 / 255


def test_idle_sizes_make_room_and_busy_ones_do_not(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1) as batcher:
        sizes = [{**STAR, "height": 64 + 8 * number, "num_inference_steps": 1} for number in range(MAX_POOLS + 2)]
        futures = [batcher.submit(**request) for request in sizes[:MAX_POOLS]]
        with pytest.raises(QueueFullError, match="images of 4 other sizes are being drawn: at most so many"):
            batcher.submit(**sizes[-1])
        gate.open()
        for future in futures:
            future.result(300)
        for request in sizes:
            batcher.submit(**request).result(300)
        assert len(batcher._queue.pools) == MAX_POOLS


def test_threads_share_a_batcher(pipe: Pipeline) -> None:
    requests = [{**STAR, "seed": seed, "guidance_scale": 1.0 + seed % 2 * 3} for seed in range(6)]
    with Batcher(pipe, slots=3, fixed_rows=True) as batcher:
        alone = [batcher.submit(**request).result(300).images for request in requests]
        with ThreadPoolExecutor(6) as pool:
            for pictures, expected in zip(
                pool.map(lambda n: batcher.submit(**requests[n % 6]).result(300).images, range(24)),
                alone * 4,
                strict=True,
            ):
                np.testing.assert_array_equal(pictures, expected)


def test_the_pipeline_itself_gets_its_turn_meanwhile(pipe: Pipeline) -> None:
    with Batcher(pipe, slots=2) as batcher:
        long = batcher.submit(**{**STAR, "num_inference_steps": 600})
        picture = pipe(**STAR).images
        assert not long.done() and long.cancel()
        assert np.abs(batcher.submit(**STAR).result(300).images - picture).max() <= 1 / 255


def test_close_draws_what_was_submitted(pipe: Pipeline) -> None:
    batcher = Batcher(pipe, slots=1)
    futures = [batcher.submit(**STAR) for _ in range(3)]
    batcher.close()
    assert all(len(future.result(0).images) == 1 for future in futures)
    with pytest.raises(EngineError, match="the batcher is closed: open another one"):
        batcher.submit(**STAR)
    batcher.close()
    assert len(pipe(**STAR).images) == 1  # it is the caller's


def test_close_with_cancel_drops_what_was_submitted(pipe: Pipeline, gate: Gate) -> None:
    batcher = Batcher(pipe, slots=1)
    futures = [batcher.submit(**{**STAR, "num_inference_steps": 60}) for _ in range(3)]
    gate.run(2)
    gate.open()
    batcher.close(cancel=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)


def test_a_block_that_raises_cancels(pipe: Pipeline, gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError), Batcher(pipe, slots=1) as batcher:
        future = batcher.submit(**STAR)
        gate.open()
        gate._permits.acquire()
        1 / 0  # noqa: B018
    assert future.done()


def test_a_callback_may_submit_but_not_close(pipe: Pipeline) -> None:
    seen: list[Any] = []
    with Batcher(pipe, slots=1) as batcher:

        def again(future: Any) -> None:
            try:
                seen.append(batcher.submit(**STAR))
                batcher.close()
            except Exception as error:
                seen.append(error)

        batcher.submit(**STAR).add_done_callback(again)
        while len(seen) < 2:
            threading.Event().wait(0.01)
    assert len(seen[0].result(300).images) == 1
    assert isinstance(seen[1], RequestError) and "a callback of a future closed its batcher" in str(seen[1])


def test_memory_is_given_back_at_close(pipe: Pipeline) -> None:
    pipe(**STAR)
    before, held = pipe.backend.device.tensor_bytes(), set(pipe.session._used())
    for cancel in (False, True):
        batcher = Batcher(pipe, slots=3)
        futures = [batcher.submit(**{**STAR, "height": height, "num_images_per_prompt": 4}) for height in (64, 72)]
        futures[0].result(300)
        assert pipe.backend.device.tensor_bytes() > before
        batcher.close(cancel=cancel)
        assert pipe.backend.device.tensor_bytes() == before
    assert pipe.session._used() == held


def test_a_bundle_is_opened_and_closed_with_the_batcher() -> None:
    with Batcher(ensure_bundle(), slots=1, backend="onnxruntime-cpu", threads=1) as batcher:
        assert len(batcher.submit(**STAR).result(300).images) == 1
    with pytest.raises(EngineError, match="the pipeline is closed"):
        batcher.pipe(**STAR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0: give a whole number from 1 to 512"),
        ({"slots": True}, "slots is True"),
        ({"slots": 4, "rows": 3}, "rows is 3: give a whole number from 4 to 1024"),
        ({"slots": 1, "rows": 1}, "rows is 1: give a whole number from 2"),
        ({"max_waiting": 1.5}, "max_waiting is 1.5"),
        ({"slots": "8"}, "slots is '8': give a whole number"),
        ({"slots": None}, "slots is None"),
        ({"slots": "8", "rows": 8}, "slots is '8'"),
        ({"rows": "8"}, "rows is '8'"),
        ({"max_wait": "5"}, "max_wait is '5': give seconds, more than 0, or leave it out"),
        ({"max_wait": True}, "max_wait is True"),
    ],
)
def test_numbers_out_of_range_are_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Batcher(pipe, **options)


def test_a_pipeline_with_low_memory_is_refused() -> None:
    with (
        Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1, low_memory=True) as pipe,
        pytest.raises(RequestError, match="opened with low_memory: a batcher needs all engines"),
    ):
        Batcher(pipe)


FORGOTTEN = """
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Batcher
batcher = Batcher(ensure_bundle(), backend="onnxruntime-cpu", threads=1)
future = batcher.submit("a star", height=64, width=64, num_inference_steps=2)
future.result(300)
late = batcher.submit("a star", height=64, width=64, num_inference_steps=900)
print("end")
"""


def test_a_batcher_that_nobody_closed_does_not_hold_up_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=600, check=True)
    assert (done.stdout, done.stderr) == ("end\n", "")
