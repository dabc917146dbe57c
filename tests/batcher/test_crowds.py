"""Requests in a crowd in which everything goes wrong: each gets the picture that it gets alone, bit for bit.

Beside them requests are cancelled, some turn to no numbers, steps fail once and twice, one request makes every step
fail that it is in, and images leave their slots by lot.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.engines.errors import EngineError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher, pool
from latentrt.runtime.batcher.policy import Candidate, Decision, decide
from latentrt.runtime.batcher.prepared import Prepared
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.batcher.times import StepTimes

from .requests import SMALL, alone, mixed

GUILTY = "a prompt that breaks every step"


@pytest.fixture(scope="module")
def eager() -> Iterator[Pipeline]:
    """A pipeline whose steps are not captured, so that each is enqueued anew."""
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1, mode="eager") as opened:
        yield opened


class Trouble:
    """Steps that fail, and images that leave their slots, by lot."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.choose, self.count, self.left = random.Random(seed), Counter[str](), 0
        self.again = False
        """Whether the next step is a second try."""
        self.token_ids = pipe._batches.tokens(GUILTY)["token_ids"][-1]
        occupy, release, enqueue = Slots._occupy, Slots.release, Slots._enqueue
        guilty = set[tuple[int, int]]()  # slots of the request that breaks every step, by the buffers they are in

        def occupied(slots: Slots, image: Prepared, *arguments: Any) -> int:
            slot = occupy(slots, image, *arguments)
            if (image.inputs["token_ids"][-1] == self.token_ids).all():
                guilty.add((id(slots), slot))
            return slot

        def released(slots: Slots, slot: int) -> None:
            guilty.discard((id(slots), slot))
            release(slots, slot)

        def marked(slots: Slots) -> bool:
            return any(buffers == id(slots) for buffers, _ in guilty)

        def step(slots: Slots, bucket: int, step: Any = Slots.step) -> None:
            most = min(2, len(slots._taken))  # of an image that is alone two failures would be its end
            if not self.again:
                self.left = min(most, self.choose.choices((0, 1, 2), (90, 6, 4))[0])
            self.again = not self.again and (self.left > 0 or marked(slots))
            if marked(slots):
                self.count["guilty"] += 1
                raise EngineError("this request breaks every step")
            step(slots, bucket)

        def enqueued(pair: Any, stream: Any) -> None:
            enqueue(pair, stream)  # what it writes is written again
            if self.left:
                self.left -= 1
                self.count["failed"] += 1
                raise EngineError("the device had enough")

        monkeypatch.setattr(Slots, "_occupy", occupied)
        monkeypatch.setattr(Slots, "release", released)
        monkeypatch.setattr(Slots, "step", step)
        monkeypatch.setattr(Slots, "_enqueue", staticmethod(enqueued))
        monkeypatch.setattr(pool, "decide", self.decide)

    def decide(
        self,
        waiting: Sequence[Candidate],
        running: Sequence[Candidate],
        times: StepTimes,
        now: float,
        *,
        slots: int,
        parking: int | None,
    ) -> Decision:
        if self.choose.random() < 0.7 or not waiting:
            return decide(waiting, running, times, now, slots=slots, parking=parking)
        out = [index for index in range(len(running)) if self.choose.random() < 0.5]
        free = slots - len(running) + len(out)
        admit = self.choose.sample(range(len(waiting)), min(free, len(waiting)))
        self.count["swapped"] += len(out)
        return Decision(tuple(out), tuple(admit), 0)


def in_a_crowd(batcher: Batcher, requests: Sequence[dict[str, Any]], poison: str, seed: int) -> list[Array]:
    """Draw all at once, in some order, among others that come to nothing."""
    choose, order = random.Random(seed), list(range(len(requests)))
    choose.shuffle(order)
    futures, others, lost = {}, [], []
    for place, number in enumerate(order):
        futures[batcher.submit(**requests[number])] = number
        if place % 4 == 0:
            others.append(batcher.submit(**{**requests[number], "num_inference_steps": 40, "seed": place}))
        if place % 9 == 1:
            lost.append(batcher.submit(**{**SMALL, "prompt": poison, "num_inference_steps": choose.randint(2, 9)}))
        if place % 9 == 5:
            lost.append(batcher.submit(**{**SMALL, "prompt": GUILTY, "num_inference_steps": 6}))
    found: dict[int, Array] = {}
    for future in as_completed(futures, timeout=3000):
        found[futures[future]] = future.result().images
        if others and choose.random() < 0.5:
            others.pop(choose.randrange(len(others))).cancel()
    for other in others:
        other.cancel()
    for future in lost:
        with pytest.raises(EngineError, match=r"this request breaks every step|latents that are not finite"):
            future.result(300)
    return [found[number] for number in range(len(requests))]


def check(pipe: Pipeline, poison: str, monkeypatch: pytest.MonkeyPatch, count: int, most_steps: int) -> None:
    requests = mixed(count, most_steps, seed=7, pictures=True)
    with Batcher(pipe, slots=4, fixed_rows=True, max_waiting=10_000) as batcher:
        expected = alone(batcher, requests)
    for fixed, seed in ((True, 1), (False, 2)):
        with monkeypatch.context() as patch, Batcher(pipe, slots=4, fixed_rows=fixed, max_waiting=10_000) as batcher:
            trouble = Trouble(pipe, patch, seed)
            found = in_a_crowd(batcher, requests, poison, seed)
        stats = batcher.stats()
        for request, one, other in zip(requests, expected, found, strict=True):
            if fixed:
                np.testing.assert_array_equal(one, other, err_msg=str(request))
            else:
                assert np.abs(one - other).max() <= 1 / 255, request
        assert min(trouble.count[name] for name in ("guilty", "failed", "swapped")) >= count // 10
        assert stats.swapped > 0 and stats.retried > 0 and stats.cancelled > 0
        assert stats.failed.keys() == {"EngineError"}
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.submitted == stats.finished + stats.cancelled + sum(stats.failed.values())


@pytest.mark.long
def test_a_small_crowd_in_trouble(eager: Pipeline, poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(eager, poison, monkeypatch, count=12, most_steps=5)


@pytest.mark.slow
def test_a_large_crowd_in_trouble(eager: Pipeline, poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(eager, poison, monkeypatch, count=200, most_steps=16)
