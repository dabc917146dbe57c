"""How requests arrive: at random times of a given rate, or as soon as there is room; what came of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .curve import Curve
from .mixes import Work

BOUND = 8.0
"""A request is answered well within so many times what it takes alone."""
COLD = 0.1
"""Share of the requests, the first ones, that no figure counts: the server was empty before them."""


@dataclass(eq=False)
class Entry:
    """One request: when it came, began and ended, in seconds; no end when it was turned away."""

    index: int
    work: Work
    alone: float
    arrived: float = math.nan
    began: float = math.nan
    ended: float = math.nan
    done: int = 0
    """Evaluations that have been run."""
    foreseen: float = math.nan
    """Seconds that it was said to take when it came."""

    @property
    def rows(self) -> int:
        """Network rows of its image."""
        return self.work.rows

    @property
    def latency(self) -> float:
        """Seconds from arrival to end; infinite when it was turned away."""
        return math.inf if math.isnan(self.ended) else self.ended - self.arrived


class Arrivals:
    """Requests in order, by Poisson arrivals at `rate` a second; at rate infinity each comes when there is room."""

    def __init__(self, works: Sequence[Work], curve: Curve, rate: float, *, queue: int, seed: int = 0) -> None:
        """Draw the gaps: the same seed gives the same ones at every rate, in proportion."""
        alone = {work: curve.alone(work.rows, work.steps) for work in set(works)}
        self.entries = [Entry(i, work, alone[work]) for i, work in enumerate(works)]
        self.queue, self.rate = queue, rate
        self._next = 0
        gaps = np.random.default_rng(seed).exponential(size=len(works))
        self.moments: list[float] = [] if math.isinf(rate) else np.cumsum(gaps / rate).tolist()

    def take(self, now: float, waiting: int) -> Iterator[Entry]:
        """Yield what has come until now and finds a place beside those that wait; the others are turned away."""
        while self._next < len(self.entries):
            entry = self.entries[self._next]
            if not self.moments:
                if waiting >= self.queue:
                    return
                entry.arrived = now
            elif self.moments[self._next] > now:
                return
            else:
                entry.arrived = self.moments[self._next]
            self._next += 1
            if waiting < self.queue:
                waiting += 1
                yield entry

    @property
    def following(self) -> float | None:
        """When the next request comes; None when all have come."""
        if self._next == len(self.entries):
            return None
        return self.moments[self._next] if self.moments else 0.0


@dataclass
class Outcome:
    """All requests of a run, and how the device was used."""

    entries: Sequence[Entry]
    steps: int = 0
    rows_used: int = 0
    rows_run: int = 0
    busy: float = 0.0
    """Seconds in which the device ran steps, encoders or decoders."""
    span: float = 0.0
    """Seconds from the first arrival to the last end."""
    parts: Sequence[Outcome] = ()
    """Runs that this one is made of, each from an empty server."""

    def step(self, used: int, run: int, seconds: float, times: int = 1) -> None:
        """Note a step, or several equal ones, that took so many seconds in all."""
        self.steps += times
        self.rows_used += times * used
        self.rows_run += times * run
        self.busy += seconds

    @property
    def counted(self) -> Sequence[Entry]:
        """Requests that figures are made of: all but the first."""
        if self.parts:
            return [entry for part in self.parts for entry in part.counted]
        return self.entries[int(COLD * len(self.entries)) :]

    def latency(self, percentile: float) -> float:
        """Return a percentile of latency over all requests; infinite where so many were turned away."""
        values = sorted(entry.latency for entry in self.counted)
        return values[min(len(values) - 1, math.ceil(percentile / 100 * len(values)) - 1)]

    def within(self, bound: float = BOUND) -> float:
        """Return the share of requests that were answered within so many times what they take alone."""
        counted = self.counted
        return sum(entry.latency <= bound * entry.alone for entry in counted) / len(counted)

    def refused(self) -> float:
        """Return the share of requests that were turned away."""
        return sum(math.isinf(entry.latency) for entry in self.counted) / len(self.counted)

    def throughput(self) -> float:
        """Return images a second while there was always work: from a tenth of the ends to the last arrival.

        Counted by their work, as a mix's own average image, so that it does not matter which ones end in that time.
        """
        last = max(entry.arrived for entry in self.entries if not math.isnan(entry.arrived))
        ends = sorted((entry.ended, entry.alone) for entry in self.entries if not math.isnan(entry.ended))
        first = ends[int(COLD * len(ends))][0]
        if last <= first:  # so few that all found room at once
            first, last = min(entry.arrived for entry in self.entries), ends[-1][0]
        done = sum(alone for ended, alone in ends if first < ended <= last)
        return done / (last - first) / mean_alone(self.entries)

    def figures(self) -> dict[str, Any]:
        """Return what a record says of a run."""
        return {
            "requests": len(self.entries),
            "counted": len(self.counted),
            "refused_share": self.refused(),
            "within_bound_share": self.within(),
            "latency": {f"p{p}": finite(self.latency(p)) for p in (50, 90, 99)},
            "occupancy": self.rows_used / self.rows_run if self.rows_run else None,
            "rows_per_step": self.rows_used / self.steps if self.steps else None,
            "busy_share": self.busy / self.span if self.span else None,
        }


def pooled(parts: Sequence[Outcome]) -> Outcome:
    """Return what was seen in several runs at one rate."""
    found = Outcome([entry for part in parts for entry in part.entries], parts=parts)
    for name in ("steps", "rows_used", "rows_run", "busy", "span"):
        setattr(found, name, sum(getattr(part, name) for part in parts))
    return found


def mean_alone(entries: Sequence[Entry]) -> float:
    """Return the average seconds that a request takes alone."""
    return sum(entry.alone for entry in entries) / len(entries)


def finite(value: float) -> float | None:
    """Return a number, or None for infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
