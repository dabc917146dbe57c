"""What a batcher is at and has counted, also after it was closed, and who is told of what a service does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..batcher.stats import Stats

if TYPE_CHECKING:
    from ..batcher import Batcher
    from .job import Job

MAX_FAILURES = 3
"""Turns of the loop that fail in a row, after which a device is no good."""


@dataclass(frozen=True)
class Figures:
    """What there is of a model at one moment, none while it is not open, and what has been since the start."""

    gauges: Mapping[str, float]
    counts: Mapping[str, float]


def figures_of(batcher: Batcher | None, closed: Mapping[str, float]) -> Figures:
    """Return the figures of a model; `closed` is what its batchers before that have counted."""
    if batcher is None:
        return Figures({}, closed)
    stats = batcher.stats()
    gauges = {
        "queue_images": stats.waiting,
        "queue_oldest_seconds": stats.oldest_waiting_seconds,
        "queue_work_seconds": stats.work_seconds,
        "running_images": stats.running,
        "slots": stats.slots,
        "rows": stats.rows,
        "failures_in_a_row": stats.failures_in_a_row,
        "stuck_seconds": batcher.stuck_seconds,
        "tensor_bytes": batcher.pipe.backend.device.tensor_bytes(),
    }
    return Figures(gauges, summed(closed, counts_of(stats)))


def memory_of(batcher: Batcher) -> dict[str, Counter[str]]:
    """Return the bytes of weights, as files have them, and of buffers, each by graph, at this moment.

    The denoiser's buffers are those of the steps as well, and what scratch memory engines share.
    """
    weights, buffers = Counter[str](), Counter[str]()
    for name, nbytes, own in batcher.pipe.session._shared.memory():
        weights[name] += nbytes
        buffers[name] += own
    for name, own in (each for pool in list(batcher._queue.pools.values()) for each in pool.memory()):
        buffers[name] += own
    buffers["denoiser"] += max(0, batcher.pipe.backend.device.tensor_bytes() - buffers.total())
    return {"weights": weights, "buffers": buffers}


def counts_of(stats: Stats) -> dict[str, float]:
    """Return the numbers that only grow while a batcher is open."""
    return {
        "rows_used": stats.rows_used,
        "rows_run": stats.rows_run,
        "rows_wasted": stats.rows_run - stats.rows_used,
        "steps": sum(stats.steps.values()),
        "admissions": stats.admitted,
        "swaps": stats.swapped,
        "step_retries": stats.retried,
        "cancellations": stats.cancelled,
        "deadlines_missed": stats.too_late,
    }


def summed(*counts: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of counts by name."""
    return {name: sum(each.get(name, 0) for each in counts) for name in dict.fromkeys(chain.from_iterable(counts))}


def fault_of(name: str, batcher: Batcher | None, step_timeout: float) -> str | None:
    """Return why a model's device is no good any more, a step that hangs or turns that fail; None while it is good."""
    if batcher is None:
        return None
    if (stuck := batcher.stuck_seconds) > step_timeout:
        return f"a step of model {name} has hung for {stuck:.0f} s"
    failures = batcher.failures_in_a_row
    return f"{failures} steps of model {name} failed in a row" if failures >= MAX_FAILURES else None


class ServiceObserver:
    """Is told of what happens in a service: inherit from it, and define what is wanted. Calls come from any thread."""

    def observer(self, model: str) -> Any:
        """Return the `Observer` of a model's batcher, or None."""

    def ended(self, job: Job) -> None:
        """A job is over."""

    def loaded(self, model: str, seconds: float | None) -> None:
        """A bundle was opened in some seconds; None: it could not be."""
