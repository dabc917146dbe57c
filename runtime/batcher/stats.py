"""What a batcher counts, and who is told of it meanwhile."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engines.errors import DeadlineError
from ..result import Timings

COUNTED = (
    *("rows_used", "rows_run", "submitted", "admitted", "swapped"),
    *("finished", "cancelled", "too_late", "rejected", "retried"),
)

log = logging.getLogger(__name__)


class Observer:
    """Is told of what happens in a batcher: inherit from it, and define what is wanted.

    Calls come from several threads, those of steps from the loop's own: do little. What a method raises is logged and
    goes no further.
    """

    def stepped(self, bucket: int, used: int, seconds: float) -> None:
        """A step of `bucket` network rows, of which `used` had an image, took so long."""

    def admitted(self, queue_seconds: float) -> None:
        """An image has a slot for the first time, so long after its request came."""

    def decoded(self, seconds: float) -> None:
        """An image was decoded."""

    def finished(self, timings: Timings) -> None:
        """A request has its result."""

    def failed(self, error: BaseException) -> None:
        """A request has failed, or was too late (`DeadlineError`)."""

    def cancelled(self) -> None:
        """A request was cancelled."""

    def rejected(self, error: BaseException) -> None:
        """A request was refused when it came."""

    def swapped(self) -> None:
        """An image had to leave its slot for one that is due earlier, and waits to go on."""

    def retried(self) -> None:
        """A step failed and was run again."""


@dataclass(frozen=True)
class SizeStats:
    """What there is of one size: images that wait and run, the work that is left in seconds, and its step times."""

    width: int
    height: int
    waiting: int
    running: int
    seconds: float | None
    curve: Mapping[int, float]


@dataclass(frozen=True)
class Stats:
    """A batcher at one moment. Numbers of steps, images and requests are those since it was opened.

    waiting, running         images in the queue and in slots
    oldest_waiting_seconds   how long the image has waited that came first; 0 when none waits
    slots, rows              images that may be in flight of a size, and the network rows they share
    steps, step_seconds      steps that are done by the rows they computed, and the seconds they took in all
    rows_used, rows_run      network rows of images, and all that were computed: their ratio is the occupancy
    submitted                requests that were taken; each ends as finished, failed, cancelled or too late
    failed                   by the name of the exception
    rejected                 requests that `submit` refused
    admitted, swapped        images that got a slot for the first time, and that left it for others
    retried                  steps that were run again
    failures_in_a_row        turns of the loop that have failed since a step worked
    work_seconds             the work that is left of all that was taken, in seconds of steps
    curve                    seconds of a step by its rows, of the size that has had most steps
    sizes                    each size that has buffers or work
    """

    waiting: int
    running: int
    oldest_waiting_seconds: float
    slots: int
    rows: int
    steps: Mapping[int, int]
    step_seconds: Mapping[int, float]
    rows_used: int
    rows_run: int
    submitted: int
    admitted: int
    swapped: int
    finished: int
    failed: Mapping[str, int]
    cancelled: int
    too_late: int
    rejected: int
    retried: int
    failures_in_a_row: int
    work_seconds: float
    curve: Mapping[int, float]
    sizes: tuple[SizeStats, ...]


@dataclass
class Tally:
    """Counts, and tells an observer."""

    observer: Observer = field(default_factory=Observer)
    counts: Counter[str] = field(default_factory=Counter)
    failed_by: Counter[str] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    step_seconds: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    failures_in_a_row: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stepped(self, bucket: int, used: int, seconds: float) -> None:
        """Count a step."""
        with self._lock:
            self.steps[bucket] += 1
            self.step_seconds[bucket] += seconds
            self.counts["rows_used"] += used
            self.counts["rows_run"] += bucket
            self.failures_in_a_row = 0
        self.tell("stepped", bucket, used, seconds)

    def count(self, what: str, *arguments: Any) -> None:
        """Count something by the name of the observer's method, which gets the arguments."""
        with self._lock:
            self.counts[what] += 1
        self.tell(what, *arguments)

    def failed(self, error: BaseException) -> None:
        """Count a request that failed or was too late."""
        with self._lock:
            if isinstance(error, DeadlineError):
                self.counts["too_late"] += 1
            else:
                self.failed_by[type(error).__name__] += 1
        self.tell("failed", error)

    def failed_turn(self) -> None:
        """Count a turn of the loop that failed."""
        with self._lock:
            self.failures_in_a_row += 1

    def tell(self, method: str, *arguments: Any) -> None:
        """Call the observer."""
        call: Callable[..., object] = getattr(self.observer, method, _nothing)
        try:
            call(*arguments)
        except Exception:
            log.exception("an observer of a batcher failed in %s", method)

    def snapshot(self) -> dict[str, Any]:
        """Return the fields of `Stats` that are counted, as they are at one moment."""
        with self._lock:
            return {name: self.counts[name] for name in COUNTED} | {
                "steps": dict(self.steps),
                "step_seconds": dict(self.step_seconds),
                "failed": dict(self.failed_by),
                "failures_in_a_row": self.failures_in_a_row,
            }


def _nothing(*_: object) -> None: ...
