"""`latentrt plan`: how many devices a rate of requests needs so that they are answered in time, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...engines.errors import RequestError
from .arrivals import BOUND, Arrivals, Outcome
from .mixes import Mix
from .simulate import POLICIES, Policy, Setup, saturation, simulate

REQUESTS = 10_000
"""Simulated for each number of devices: the 99th percentile is made of the slowest hundred."""
MOST_DEVICES = 10_000
REFUSED = 0.001
"""Share of requests that may find a full queue."""


@dataclass(frozen=True)
class Plan:
    """A number of devices, and what is to be expected of each."""

    devices: int
    for_rate: int
    """Devices that the rate alone needs; with more, it is the latency that does."""
    rate: float
    """Images a second of one device."""
    most: float
    """Images a second that one device can do."""
    outcome: Outcome
    alone: tuple[float, float]
    """Median and 99th percentile of what requests take on an idle device."""
    others: dict[Policy, int | None]
    """Devices that other policies need; None: no number is enough."""
    options: tuple[str, ...]
    """Of `latentrt serve` for each device."""

    def as_record(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        outcome = self.outcome
        return {
            "devices": self.devices,
            "limited_by": self.limit,
            "devices_for_the_rate_alone": self.for_rate,
            "images_per_second_each": self.rate,
            "images_per_second_each_at_most": self.most,
            "alone_seconds": {"p50": self.alone[0], "p99": self.alone[1]},
            **outcome.figures(),
            "other_policies": self.others,
            "serve": self.options,
        }

    @property
    def limit(self) -> str:
        """What would break first with a device less."""
        return "rate" if self.devices == self.for_rate else "latency"


def plan(setup: Setup, mix: Mix, rate: float, p99: float, *, requests: int | None = None, seed: int = 0) -> Plan:
    """Return the fewest devices on which 99 % of the requests end within `p99` seconds, and hardly any is turned away.

    Requests go to devices at random, so that each device sees Poisson arrivals of its share. Raises `RequestError` when
    no number is enough: some requests take longer on an idle device.
    """
    requests = requests or REQUESTS
    for name, value in (("rate", rate), ("p99", p99)):
        if not (value > 0 and math.isfinite(value)):
            raise RequestError(f"{name} is {value!r}: give a number above 0")
    alone = sorted(entry.alone for entry in Arrivals(mix.draw(requests, seed), setup.curve, rate, queue=1).entries)
    typical, slowest = alone[len(alone) // 2], alone[math.ceil(0.99 * len(alone)) - 1]
    if slowest > p99:
        raise RequestError(
            f"p99 is {p99:g} s: 1 % of the mix {mix.name} take {slowest:.3g} s or more on an idle device "
            f"({setup.curve.name}), so no number of them is enough; give more time, fewer steps or a faster device"
        )
    outcomes: dict[int, Outcome] = {}

    def met(devices: int, policy: Policy = "in-flight") -> bool:
        outcome = simulate(policy, setup, mix, rate / devices, requests=requests, seed=seed)
        if policy == "in-flight":
            outcomes[devices] = outcome
        return outcome.latency(99) <= p99 and outcome.refused() <= REFUSED

    short = replace(setup, queue=min(setup.queue, requests // 10))  # a deeper queue would take all of them at once
    most = {policy: saturation(policy, short, mix, requests=requests, seed=seed).throughput() for policy in POLICIES}
    for_rate = math.ceil(rate / most["in-flight"])
    devices = fewest(met, for_rate)
    if devices is None:
        raise RequestError(
            f"p99 is {p99:g} s at {rate:g} images/s: {MOST_DEVICES} devices are not enough; give more time or less rate"
        )
    others: dict[Policy, int | None] = {}
    for policy in POLICIES[1:]:
        others[policy] = fewest(lambda count, policy=policy: met(count, policy), math.ceil(rate / most[policy]))  # type: ignore[misc]
    found, each = outcomes[devices], rate / devices
    options = setup.options(mix, max(p99, *(entry.latency for entry in found.counted if math.isfinite(entry.latency))))
    return Plan(devices, for_rate, each, most["in-flight"], found, (typical, slowest), others, options)


def fewest(met: Callable[[int], bool], least: int) -> int | None:
    """Return the smallest number from `least` on that is enough, None when there is none; more is never worse."""
    high = max(1, least)
    low = high - 1
    while not met(high):
        low, high = high, 2 * high
        if low > MOST_DEVICES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high


def text(found: Plan, setup: Setup, mix: Mix, rate: float, p99: float) -> str:
    """Return a plan in words."""
    curve, outcome = setup.curve, found.outcome
    reason = {
        "rate": "the rate needs them all",
        "latency": f"the rate alone needs {found.for_rate}, the latency the others",
    }[found.limit]
    p50, p90, last = (outcome.latency(percentile) for percentile in (50, 90, 99))
    used = outcome.rows_used / outcome.rows_run
    others = ", ".join(f"{policy} {count or 'none is enough'}" for policy, count in found.others.items())
    lines = [
        ("devices", f"{found.devices}: {reason}"),
        ("each", f"{found.rate:.3g} images/s, {found.rate / found.most:.0%} of what it can do ({found.most:.3g})"),
        ("busy", f"{outcome.busy / outcome.span:.0%} of the time, with {outcome.rows_used / outcome.steps:.1f} rows"),
        ("occupancy", f"{used:.0%} of the rows that are computed"),
        ("latency", f"p50 {p50:.3g} s, p90 {p90:.3g} s, p99 {last:.3g} s (wanted: {p99:g} s)"),
        ("alone", f"p50 {found.alone[0]:.3g} s, p99 {found.alone[1]:.3g} s"),
        ("in bounds", f"{outcome.within():.1%} within {BOUND:g} times their own time alone"),
        ("otherwise", others),
        ("", ""),
        ("curve", f"{curve.name}, {_KINDS[curve.kind]}: {curve.title}"),
        ("", curve.source),
        *([("", beyond)] if (beyond := curve.extrapolated(setup.rows)) else []),
        (
            "simulated",
            f"{len(outcome.entries)} requests of the mix {mix.name} on each device, Poisson arrivals of "
            f"{rate:g} images/s spread at random; {setup.slots} slots, {setup.rows} rows, {setup.queue} may wait",
        ),
        ("serve", f"latentrt serve {' '.join(found.options)}"),
        ("left out", "HTTP, PNG and network; devices that fail; load that is not steady"),
    ]
    return "\n".join(f"{name:<10} {said}".rstrip() for name, said in lines)


_KINDS = {
    "measured": "measured",
    "published": "published by others, not measured here",
    "model": "a model, no measurement",
}
