"""Images that leave their slots for others and go on later, in any slot: the same bits as without."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.engines.errors import EngineError
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher, pool
from latentrt.runtime.batcher.policy import Candidate, Decision
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.batcher.times import StepTimes

from .conftest import Gate
from .requests import SMALL, alone, mixed

LONG: dict[str, Any] = {**SMALL, "prompt": "a star", "seed": 1, "num_inference_steps": 40, "sampler": "unipc"}
SHORT: dict[str, Any] = {**SMALL, "prompt": "a cross", "seed": 2, "num_inference_steps": 3, "sampler": "euler_a"}


class Unsettled:
    """Decides by lot who is in flight."""

    def __init__(self, seed: int) -> None:
        self._choose, self.swaps = random.Random(seed), 0

    def __call__(
        self,
        waiting: Sequence[Candidate],
        running: Sequence[Candidate],
        times: StepTimes,
        now: float,
        *,
        slots: int,
        parking: int | None,
    ) -> Decision:
        out = [index for index in range(len(running)) if self._choose.random() < 0.5]
        free = slots - len(running) + len(out)
        admit = self._choose.sample(range(len(waiting)), min(free, len(waiting), self._choose.randint(1, slots)))
        self.swaps += len(out)
        return Decision(tuple(out), tuple(admit), 0)


@pytest.fixture(params=[True, False], ids=["fixed rows", "buckets"])
def batcher(request: pytest.FixtureRequest, pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe, slots=3, fixed_rows=request.param, max_waiting=100) as opened:
        yield opened


def test_images_that_come_and_go_are_the_same(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed(8, most_steps=8, seed=11)
    expected = alone(batcher, requests)
    monkeypatch.setattr(pool, "decide", unsettled := Unsettled(seed=2))
    futures = [batcher.submit(**request) for request in requests]
    for future, images in zip(futures, expected, strict=True):
        found = future.result(300).images
        if len(batcher._queue.shared.buckets) == 1:
            np.testing.assert_array_equal(found, images)
        else:
            assert np.abs(found - images).max() <= 1 / 255
    assert unsettled.swaps > 10 and batcher.stats().swapped == unsettled.swaps


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> list[Array]:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        return alone(batcher, [LONG, SHORT])


def test_a_short_image_takes_the_place_of_a_long_one(pipe: Pipeline, gate: Gate, expected: list[Array]) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        long = batcher.submit(**LONG)
        gate.run(12)  # until steps have a time
        short = batcher.submit(**SHORT)
        assert short.progress().position == 0
        gate.run(1)
        assert (batcher.waiting, batcher.running) == (1, 1)
        assert (long.progress().state, long.progress().position, short.progress().state) == ("running", 0, "running")
        gate.run(2)
        np.testing.assert_array_equal(short.result(300).images, expected[1])
        assert long.progress().done == 12
        gate.open()
        np.testing.assert_array_equal(long.result(300).images, expected[0])
        assert batcher.stats().swapped == 1


def test_what_left_its_slot_is_freed_when_nobody_wants_it(pipe: Pipeline, gate: Gate) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        long = batcher.submit(**LONG)
        gate.run(12)
        before = pipe.backend.device.tensor_bytes()
        short = batcher.submit(**SHORT)
        gate.run(1)
        assert batcher.stats().swapped == 1 and pipe.backend.device.tensor_bytes() > before
        assert long.cancel()
        gate.run(1)
        assert pipe.backend.device.tensor_bytes() == before
        gate.open()
        assert short.result(300).images.shape == (1, 64, 64, 3)


def test_without_memory_images_keep_their_slots(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    monkeypatch.setattr(Slots, "parking", lambda slots: (_ for _ in ()).throw(EngineError("out of memory")))
    with Batcher(pipe, slots=1, rows=2) as batcher:
        long = batcher.submit(**LONG)
        gate.run(12)
        short = batcher.submit(**SHORT)
        gate.open()
        for future, images in zip((long, short), expected, strict=True):
            np.testing.assert_array_equal(future.result(300).images, images)
        assert batcher.stats().swapped == 0 and not batcher.stats().failed


def test_a_place_that_cannot_be_written_ends_who_was_in_flight_alone(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        long = batcher.submit(**LONG)
        gate.run(12)
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "park", lambda *_: (_ for _ in ()).throw(EngineError("a copy failed")))
            short = batcher.submit(**SHORT)
            gate.run(1)
        with pytest.raises(EngineError, match="a copy failed"):
            long.result(300)
        gate.open()
        np.testing.assert_array_equal(short.result(300).images, expected[1])


def test_an_image_that_cannot_go_on_waits_while_who_is_in_flight_fails(
    pipe: Pipeline, gate: Gate, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    with Batcher(pipe, slots=1, rows=2) as batcher:
        long = batcher.submit(**LONG)
        gate.run(12)
        short = batcher.submit(**SHORT)
        gate.run(3)
        assert short.result(300)
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "resume", lambda *_: (_ for _ in ()).throw(EngineError("a copy failed")))
            gate.run(1)
        assert batcher.failures_in_a_row == 1
        gate.open()
        np.testing.assert_array_equal(long.result(300).images, expected[0])
        assert batcher.failures_in_a_row == 0
