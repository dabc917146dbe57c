"""A simulated server: one device that takes the time of a curve, and the ways to share it.

Events are the borders of steps. Requests that come during a step are seen at its end, as the batcher sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ...runtime.batcher.policy import Candidate, decide, until_done
from ...runtime.loop.widths import buckets_of, check_numbers
from ...runtime.service import Limits
from .arrivals import Arrivals, Entry, Outcome, mean_alone
from .curve import Curve
from .mixes import Mix

Policy = Literal["in-flight", "one at a time", "static equal", "static unlike"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
BASELINES = POLICIES[1:]
SHARE = 0.99
"""Of the requests, that must be answered within their bound."""


@dataclass(frozen=True)
class Setup:
    """A server: its device, how many images it has in flight on how many rows, and how many may wait."""

    curve: Curve
    slots: int = 8
    rows: int = 16
    queue: int = 32

    def __post_init__(self) -> None:
        """Raise `RequestError` for numbers that no batcher takes."""
        check_numbers(self.slots, self.rows, self.queue, None)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row counts of a batcher that is opened so, on the engines of the curve."""
        return buckets_of(self.rows, dynamic=self.curve.dynamic)

    def options(self, mix: Mix, seconds: float) -> tuple[str, ...]:
        """Return the options of `latentrt serve` for such a server, on which requests of a mix may take so long."""
        steps = ("--max-steps", str(most)) if (most := max(mix.steps)) > Limits.steps else ()
        timeout = ("--timeout", str(math.ceil(seconds))) if seconds > Limits.timeout else ()
        own = ("--slots", str(self.slots), "--rows", str(self.rows), "--max-waiting", str(self.queue))
        return (*own, *steps, *timeout)

    @cached_property
    def knee(self) -> int:
        """The fewest rows with nearly the best throughput, or 2: how wide a static batch of unlike requests is."""
        return max(2, self.curve.times(self.buckets).knee())


def simulate(
    policy: Policy, setup: Setup, mix: Mix, rate: float, *, requests: int, seed: int = 0, foresee: bool = False
) -> Outcome:
    """Return what becomes of requests that arrive at a rate; at rate infinity there is always one more to take.

    With `foresee`, in flight, each is also told how long the batcher would say that it takes.
    """
    arrivals = Arrivals(mix.draw(requests, seed), setup.curve, rate, queue=setup.queue, seed=seed)
    outcome = Outcome(arrivals.entries)
    if policy == "in-flight":
        end = _in_flight(setup, arrivals, outcome, foresee)
    else:
        end = _static(setup, arrivals, outcome, GROUPS[policy], leave=policy == "static unlike")
    outcome.span = end - arrivals.entries[0].arrived
    return outcome


def _in_flight(setup: Setup, arrivals: Arrivals, outcome: Outcome, foresee: bool) -> float:
    """Let images come and go between steps, as the batcher's policy decides; a swap is taken to cost nothing."""
    curve, times = setup.curve, setup.curve.times(setup.buckets)
    waiting: list[Entry] = []
    running: list[Entry] = []
    now = 0.0
    while True:
        for entry in arrivals.take(now, sum(not each.done for each in waiting)):  # who left a slot has had its place
            if foresee:
                there = [_seen(each) for each in (*waiting, *running)]
                seconds = until_done([_seen(entry)], there, (), times, setup.slots)
                entry.foreseen = now + (seconds or 0.0) - entry.arrived
            waiting.append(entry)
        if not waiting and not running:
            if (following := arrivals.following) is None:
                return now
            now = max(now, following)
            continue
        seen = [_seen(entry) for entry in waiting], [_seen(entry) for entry in running]
        decision = decide(*seen, times, now, slots=setup.slots)
        chosen = [waiting[index] for index in decision.admit]
        for index in sorted(decision.admit, reverse=True):
            del waiting[index]
        waiting += [running[index] for index in decision.swap_out]
        for index in sorted(decision.swap_out, reverse=True):
            del running[index]
        for entry in chosen:
            if not entry.done:
                entry.began = now
                now += curve.encode
                outcome.busy += curve.encode
            running.append(entry)
        seconds = curve.step(decision.bucket)
        times.add(decision.bucket, seconds)
        now += seconds
        outcome.step(sum(entry.rows for entry in running), decision.bucket, seconds)
        over = []
        for entry in running:
            entry.done += 1
            if entry.done == entry.work.steps:
                over.append(entry)
        if over:
            now = _end(over, curve, outcome, now)
            running = [entry for entry in running if entry.done < entry.work.steps]


def _seen(entry: Entry) -> Candidate:
    """Return what the policy sees of a request."""
    return Candidate(entry.arrived, entry.work.rows, entry.work.steps, entry.done)


def _end(entries: Sequence[Entry], curve: Curve, outcome: Outcome, now: float) -> float:
    """Decode images one after the other, and return when that is done."""
    for entry in entries:
        now += curve.decode
        outcome.busy += curve.decode
        entry.ended = now
    return now


def _static(setup: Setup, arrivals: Arrivals, outcome: Outcome, group: Group, *, leave: bool) -> float:
    """Run a group from its first step to its last before the next one; with `leave` images end when they are done."""
    curve, waiting, now = setup.curve, list[Entry](), 0.0
    times = curve.times(setup.buckets)
    while True:
        waiting += arrivals.take(now, len(waiting))
        if not waiting:
            if (following := arrivals.following) is None:
                return now
            now = max(now, following)
            continue
        running = group(waiting, setup)
        for entry in running:
            waiting.remove(entry)
            entry.began = now
        now += len(running) * curve.encode
        outcome.busy += len(running) * curve.encode
        done = 0
        while running:
            steps = min(entry.work.steps for entry in running) - done
            used = sum(entry.rows for entry in running)
            run = times.bucket(used) if leave else used  # a pipeline's call has no buckets
            seconds = steps * curve.step(run)
            now, done = now + seconds, done + steps
            outcome.step(used, run, seconds, steps)
            over = [entry for entry in running if entry.work.steps == done]
            running = [entry for entry in running if entry.work.steps > done]
            now = _end(over, curve, outcome, now)
            if not leave:
                for entry in over:
                    entry.ended = now


def first(waiting: Sequence[Any], setup: Setup) -> list[Any]:
    """Return the request that came first; requests have a `work`."""
    return [waiting[0]]


def equals(waiting: Sequence[Any], setup: Setup) -> list[Any]:
    """Return the request that came first, and those that wait and are like it, as many as have places."""
    work = waiting[0].work
    return [entry for entry in waiting if entry.work == work][: min(setup.slots, setup.rows // work.rows)]


def unlikes(waiting: Sequence[Any], setup: Setup) -> list[Any]:
    """Return the requests that came first, as many as the knee of the curve has rows for, or one."""
    chosen: list[Any] = []
    for entry in waiting[: setup.slots]:
        if chosen and sum(each.work.rows for each in chosen) + entry.work.rows > setup.knee:
            break
        chosen.append(entry)
    return chosen


Group = Callable[[Sequence[Any], Setup], list[Any]]
GROUPS: dict[Policy, Group] = {"one at a time": first, "static equal": equals, "static unlike": unlikes}


def saturation(policy: Policy, setup: Setup, mix: Mix, *, requests: int, seed: int = 0) -> Outcome:
    """Return what becomes of requests of which the next one always waits."""
    return simulate(policy, setup, mix, math.inf, requests=requests, seed=seed)


def bounded_rate(
    policy: Policy,
    setup: Setup,
    mix: Mix,
    *,
    requests: int,
    seed: int = 0,
    precision: float = 0.01,
) -> float:
    """Return the highest rate at which 99 % of all requests end within `BOUND` times their own time alone.

    Found by bisection between nothing and what the device could do with all rows busy, to a relative precision.
    """

    def met(rate: float) -> bool:
        return simulate(policy, setup, mix, rate, requests=requests, seed=seed).within() >= SHARE

    return highest(met, capacity(setup, mix), precision)


def highest(met: Callable[[float], bool], most: float, precision: float) -> float:
    """Return the highest rate that is met, by bisection below `most`, to a relative precision; 0 when none is."""
    low, high = 0.0, most
    while high - low > precision * most and high > 1e-3 * most:
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def capacity(setup: Setup, mix: Mix) -> float:
    """Return images a second above which no policy can go: every step at the best pace that the curve has."""
    works = mix.draw(2000, 0)
    pace = min(setup.curve.step(rows) / rows for rows in range(1, setup.rows + 1))
    rows = sum(work.rows * work.steps for work in works) / len(works)
    return 1 / (rows * pace + setup.curve.encode + setup.curve.decode)


def alone_rate(setup: Setup, mix: Mix, seed: int = 0) -> float:
    """Return images a second of a device that draws one after the other without a pause."""
    return 1 / mean_alone(Arrivals(mix.draw(20_000, seed), setup.curve, math.inf, queue=1).entries)
