"""`latentrt bench serve`: policies under load over HTTP, on a paced device or on real engines, each point a record."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...engines.errors import RequestError
from ..contenders import ON_A_PROCESSOR
from ..measure import machine
from ..report.records import Record
from . import load
from .arrivals import BOUND, Arrivals, Outcome, finite, pooled
from .mixes import MIXES, Mix
from .process import Place, ServerProcess
from .servers import open_server
from .simulate import BASELINES, POLICIES, SHARE, Policy, alone_rate, bounded_rate, capacity, simulate

Rate = tuple[float, Policy | None]
"""Images a second, and the only policy that is measured at them, or None for each."""
Say = Callable[[str], object]
Keep = Callable[[Record], None]

LOADS = (0.7, 0.9)
"""Arrivals in these shares of what the better of one at a time and static batches of equals can do."""
POINTS = ("saturation", "load", "bounded")
LEAST, MOST = 60, 20_000
"""Requests of a point."""
CLOSE = 1.1
"""The bounded rate is known when a rate that was met and one that was not are no further apart than this."""
TRIES = 6
SIMULATED = 5000


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    mixes: Sequence[Mix]
    policies: Sequence[Policy] = POLICIES
    points: Sequence[str] = POINTS
    seconds: float = 60.0
    """Of a point, about."""
    http: bool = True
    base: float | None = None
    """Images a second that loads are shares of; None: measured first."""
    rates: Sequence[Rate] = ()
    """Further images a second, in the curve's own time."""
    turns: int = 1
    """Parts of a point at a rate: policies and rates take turns, each from an empty server."""
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        """Raise `RequestError` for a point that cannot be measured."""
        if unknown := [point for point in self.points if point not in POINTS]:
            raise RequestError(f"point is {unknown[0]!r}: choose {', '.join(POINTS)}")
        for value, only in self.rates:
            if only is not None and only not in self.policies:
                raise RequestError(f"--rate is {only}={value:g}: --policy leaves {only} out; give it as well")
        known = self.base is not None or ("saturation" in self.points and {*BASELINES[:2]} <= {*self.policies})
        if "load" in self.points and not known:
            raise RequestError(
                "loads are shares of what the baselines can do: measure their saturation, or give --base"
            )


def rate(given: str) -> Rate:
    """Return a rate from `RATE` or `POLICY=RATE`; raises `RequestError` for anything else."""
    policy, _, number = given.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise RequestError(f"--rate is {given!r}: give a number above 0, or POLICY=NUMBER")
    return value, policies([policy])[0] if policy else None


def policies(given: Sequence[str] | None) -> tuple[Policy, ...]:
    """Return policies by their names, all of them for None; raises `RequestError` for an unknown one."""
    if unknown := [name for name in given or () if name not in POLICIES]:
        raise RequestError(f"policy is {unknown[0]!r}: choose {', '.join(POLICIES)}")
    return tuple(policy for policy in POLICIES if not given or policy in given)


def run(place: Place, options: Options, say: Say, keep: Keep) -> list[Record]:
    """Measure every mix with every policy and return a record for each point; `keep` gets each at once.

    `place` says on what, and how wide; its policy does not matter. Its curve says what requests take alone, and is what
    is simulated beside. Rates and latencies of records are in the curve's own time, whatever its scale.
    """
    records: list[Record] = []

    def note(record: Record) -> None:
        records.append(record)
        keep(record)

    for mix in options.mixes:
        _Bench(place, mix, options, say, note).measure()
    return records


class _Bench:
    """One mix on one device."""

    def __init__(self, place: Place, mix: Mix, options: Options, say: Say, note: Keep) -> None:
        self.place, self.mix, self.options, self._say, self._note = place, mix, options, say, note
        self.setup, self.scale = place.setup, place.scale
        self.run_id = uuid.uuid4().hex[:12]

    def measure(self) -> None:
        """Measure all points: saturation of every policy first, as loads are shares of it."""
        options, best = self.options, dict[Policy, float]()
        order = [policy for policy in POLICIES if policy in options.policies]
        for policy in order if "saturation" in options.points else ():
            with self._server(policy) as ask:
                count = self._count(alone_rate(self.setup, self.mix) * self.scale)
                record = self._point(policy, ask, math.inf, count)
                best[policy] = record["seen"]["images_per_second"]
                self._note(record)
        base = options.base or max((best.get(policy, 0.0) for policy in BASELINES[:2]), default=0.0)
        shares: list[tuple[Rate, float | None]] = [((s * base, None), s) for s in LOADS if "load" in options.points]
        shares += [(each, round(each[0] / base, 3) if base else None) for each in options.rates]
        points = [(policy, rate, share) for (rate, only), share in shares for policy in order if only in (None, policy)]
        if options.turns > 1 and points:
            self._by_turns(points)
            points = []
        for policy in order:
            own = [(rate, share) for each, rate, share in points if each == policy]
            if not own and "bounded" not in options.points:
                continue
            with self._server(policy) as ask:
                for rate, share in own:
                    self._note(self._point(policy, ask, rate, self._count(rate)) | {"load": share})
                if "bounded" in options.points:
                    self._note(self._bounded(policy, ask))

    def _by_turns(self, points: Sequence[tuple[Policy, float, float | None]]) -> None:
        """Run points, each a policy at a rate, in parts, each with arrivals of its own, the same for all policies.

        A machine that is slower for some minutes is so for all of them.
        """
        turns, watch = self.options.turns, machine.LoadWatch()
        parts: list[list[tuple[Outcome, Outcome]]] = [[] for _ in points]
        with ExitStack() as servers:
            asks = {
                policy: servers.enter_context(self._server(policy)) for policy in {each[0]: None for each in points}
            }
            for turn in range(turns):
                for (policy, rate, _), found in zip(points, parts, strict=True):
                    count = -(-self._count(rate) // turns)
                    found.append(self._run(policy, asks[policy], rate, count, self.options.seed + turn))
                self._say(f"{self.mix.name}: turn {turn + 1} of {turns} is done")
        for (policy, rate, share), found in zip(points, parts, strict=True):
            seen, expected = (pooled(each) for each in zip(*found, strict=True))
            self._note(self._record(policy, rate, watch, seen, expected) | {"load": share, "turns": turns})

    def _count(self, rate: float) -> int:
        """Return how many requests come in the time of a point, at a rate in the curve's own time."""
        return min(MOST, max(LEAST, round(self.options.seconds / self.scale * rate)))

    @contextmanager
    def _server(self, policy: Policy) -> Iterator[load.Ask]:
        """Open a policy, over HTTP or in this process."""
        place = replace(self.place, policy=policy)
        if self.options.http:
            with ServerProcess(place) as server, load.OverHttp(server.port, place.pixels) as ask:
                yield ask
        else:
            with place.pipeline() as (pipe, _):
                opened = open_server(policy, pipe, self.setup, size=place.pixels)
                try:
                    yield load.in_process(opened, place.pixels)
                finally:
                    opened.close(cancel=True)

    def _point(self, policy: Policy, ask: load.Ask, rate: float, count: int) -> Record:
        """Run `count` requests at a rate, simulate the same ones, and return the record."""
        watch = machine.LoadWatch()
        return self._record(policy, rate, watch, *self._run(policy, ask, rate, count, self.options.seed))

    def _run(self, policy: Policy, ask: load.Ask, rate: float, count: int, seed: int) -> tuple[Outcome, Outcome]:
        """Return what became of `count` requests at a rate, and of the same ones by simulation."""
        setup, rate = self.setup, rate / self.scale
        arrivals = Arrivals(self.mix.draw(count, seed), setup.curve, rate, queue=setup.queue, seed=seed)
        seen = load.run(ask, arrivals, capacity=capacity(setup, self.mix))
        return seen, simulate(policy, setup, self.mix, rate, requests=count, seed=seed)

    def _record(
        self, policy: Policy, rate: float, watch: machine.LoadWatch, seen: Outcome, expected: Outcome
    ) -> Record:
        place, setup, scale = self.place, self.setup, self.scale
        figures = [_unscaled(outcome, scale, math.isinf(rate)) for outcome in (seen, expected)]
        device = "paced" if place.paced else "cpu" if place.backend in ON_A_PROCESSOR else "cuda"
        at = "saturation" if math.isinf(rate) else f"{rate:.3g} images/s"
        self._say(f"{self.mix.name}, {policy}, {at}: {_said(figures[0])}; simulated: {_said(figures[1])}")
        return {
            "kind": "serving",
            "run": self.run_id,
            **machine.stamp(watch, self.options.command, device, place.threads),
            "curve": setup.curve.as_record(setup.rows),
            "mix": {"name": self.mix.name} if self.mix == MIXES.get(self.mix.name) else self.mix.model_dump(),
            "policy": policy,
            "point": "saturation" if math.isinf(rate) else "load",
            "over": "http" if self.options.http else "in process",
            "server": {"slots": setup.slots, "rows": setup.rows, "queue": setup.queue},
            "engines": {
                "paced": place.paced,
                "bundle": place.bundle or "embedded",
                "backend": None if place.paced else place.backend,
                "size": "{}x{}".format(*place.pixels) if place.pixels else None,
            },
            "rate": finite(rate),
            "bound": BOUND,
            "seed": self.options.seed,
            "seen": figures[0],
            "simulated": figures[1],
        }

    def _bounded(self, policy: Policy, ask: load.Ask) -> Record:
        """Find the highest rate that is answered within bounds, by bisection around the one that is simulated."""
        most = capacity(self.setup, self.mix) * self.scale
        guess = bounded_rate(policy, self.setup, self.mix, requests=SIMULATED) * self.scale
        low, high, rate = 0.0, most, guess or most / 10
        tried, found = [], None
        for _ in range(TRIES):
            record = self._point(policy, ask, rate, self._count(rate))
            within = record["seen"]["within_bound_share"]
            tried.append({"rate": rate, "within_bound_share": within})
            low, high = (rate, high) if within >= SHARE else (low, rate)
            found = record if within >= SHARE or found is None else found
            if low and high <= CLOSE * low:
                break
            rate = (low + high) / 2 if low and high < most else min(1.2 * low, (low + most) / 2) if low else rate / 1.25
        more = {"point": "bounded", "bounded_rate": low, "simulated_bounded_rate": guess, "tried": tried}
        return {**(found or record), **more}


def _unscaled(outcome: Outcome, scale: float, saturated: bool) -> dict[str, Any]:
    figures = outcome.figures()
    figures["latency"] = {name: value and value / scale for name, value in figures["latency"].items()}
    if saturated:
        figures["images_per_second"] = outcome.throughput() * scale
    return figures


def _said(figures: dict[str, Any]) -> str:
    if "images_per_second" in figures:
        return f"{figures['images_per_second']:.3f} images/s"
    p50, p99 = (figures["latency"][name] for name in ("p50", "p99"))
    within = f"{figures['within_bound_share']:.1%} in bounds"
    return f"p50 {p50:.3g} s, p99 {p99:.3g} s, {within}" if p50 and p99 else f"{figures['refused_share']:.1%} refused"
