"""The embedded model, small pictures, one thread: what the batcher's tests run on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.batcher.pool import Pool

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as opened:
        yield opened


class Gate:
    """Holds the turns of batchers until it is told how many may run."""

    def __init__(self) -> None:
        self._permits, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, turns: int) -> None:
        """Let so many turns run, and wait for their end."""
        for _ in range(turns):
            self._permits.release()
            assert self._done.acquire(timeout=300), "no turn was wanted"

    def open(self) -> None:
        """Let all turns run from now on."""
        self._permits.release(1_000_000)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, turn = Gate(), Pool.turn

    def gated(pool: Pool) -> None:
        assert gate._permits.acquire(timeout=300)
        turn(pool)
        gate._done.release()

    close = Batcher._close

    def opened(batcher: Batcher, *arguments: Any) -> None:
        gate.open()  # whatever a test was about to do
        close(batcher, *arguments)

    monkeypatch.setattr(Pool, "turn", gated)
    monkeypatch.setattr(Batcher, "_close", opened)
    yield gate
    gate.open()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> str:
    """A prompt whose conditioning is no number."""
    conditioning = Encoder.conditioning

    def poisoned(encoder: Encoder, inputs: dict[str, Array]) -> dict[str, Array]:
        found = conditioning(encoder, inputs)
        if (inputs["token_ids"][-1] == marked[-1]).all():
            found = {name: np.full_like(array, np.nan) for name, array in found.items()}
        return found

    text = "a prompt that is poison"
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as pipe:
        marked = pipe._batches.tokens(text)["token_ids"]
    monkeypatch.setattr(Encoder, "conditioning", poisoned)
    return text
