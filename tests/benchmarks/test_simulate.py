"""The simulated server against closed forms of queueing theory."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median
from typing import Any

import pytest
from latentrt.benchmarks.serving import planner, process, simulate
from latentrt.benchmarks.serving.arrivals import Outcome
from latentrt.benchmarks.serving.curve import Curve, curve
from latentrt.benchmarks.serving.mixes import MIXES, Mix
from latentrt.benchmarks.serving.simulate import POLICIES, Setup
from latentrt.engines.errors import RequestError

EQUAL, DRAFT, TYPICAL = MIXES["equal"], MIXES["draft"], MIXES["typical"]
A100 = curve("a100-sd15")
LINEAR = Curve("linear", "no gain from batches", "model", "made up", {1: 0.01, 2: 0.02})
FAR = 10**9


def waits(outcome: Outcome) -> float:
    return mean(entry.began - entry.arrived for entry in outcome.entries)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_waits_as_m_d_1(load: float) -> None:
    service = A100.alone(2, 20)
    outcome = simulate.simulate("one at a time", Setup(A100, queue=FAR), EQUAL, load / service, requests=40_000)
    assert waits(outcome) == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say() -> None:
    works = DRAFT.draw(40_000, 3)
    times = [A100.alone(work.rows, work.steps) for work in works]
    rate = 0.7 / mean(times)
    outcome = simulate.simulate("one at a time", Setup(A100, queue=FAR), DRAFT, rate, requests=40_000, seed=3)
    expected = rate * mean(time**2 for time in times) / (2 * (1 - 0.7))
    assert waits(outcome) == pytest.approx(expected, rel=0.05)


def test_a_full_queue_turns_away_what_the_device_cannot_do() -> None:
    service = A100.alone(2, 20)
    outcome = simulate.simulate("one at a time", Setup(A100, queue=8), EQUAL, 2 / service, requests=20_000)
    assert outcome.refused() == pytest.approx(0.5, abs=0.01)
    assert outcome.latency(99) == math.inf and outcome.latency(40) < 10 * service


@pytest.mark.parametrize("policy", POLICIES)
def test_only_who_finds_the_queue_full_is_turned_away(policy: simulate.Policy) -> None:
    """Images that left their slots for others have had one: they take no place in the queue."""
    outcome = simulate.simulate(policy, Setup(A100, slots=2, rows=4, queue=3), TYPICAL, 3.0, requests=300)
    answered = [entry for entry in outcome.entries if not math.isinf(entry.latency)]
    refused = [entry for entry in outcome.entries if math.isinf(entry.latency)]
    there = [sum(each.arrived <= entry.arrived <= each.began for each in answered) for entry in refused]
    assert len(there) > 20 and {*there} == {3}


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_and_nothing_runs_twice(policy: simulate.Policy) -> None:
    outcome = simulate.simulate(policy, Setup(A100), TYPICAL, 1.8, requests=1500)
    answered = [entry for entry in outcome.entries if not math.isinf(entry.latency)]
    assert outcome.rows_used == sum(entry.rows * entry.work.steps for entry in answered)
    assert all(entry.ended - entry.began >= 0.999 * entry.work.steps * A100.step(entry.rows) for entry in answered)
    assert len(answered) == len(outcome.entries) - round(outcome.refused() * len(outcome.counted))


@pytest.mark.parametrize("policy", POLICIES)
def test_busy_time_is_the_work_that_came(policy: simulate.Policy) -> None:
    """Where rows gain nothing from company, no order of work saves any; the device is busy for the load (Little)."""
    setup = Setup(LINEAR, queue=FAR)
    outcome = simulate.simulate(policy, setup, EQUAL, 1.5, requests=2000)
    assert outcome.busy == pytest.approx(2000 * 20 * 0.02)
    assert outcome.busy / outcome.span == pytest.approx(1.5 * 20 * 0.02, rel=0.1)


def test_one_slot_is_one_at_a_time() -> None:
    alone, single = (
        simulate.simulate(policy, Setup(A100, slots=1, rows=2, queue=FAR), EQUAL, 1.8, requests=500)
        for policy in ("one at a time", "in-flight")
    )
    assert [entry.ended for entry in single.entries] == pytest.approx([entry.ended for entry in alone.entries])


@pytest.mark.parametrize(("policy", "rows"), [("static equal", 16), ("one at a time", 2), ("in-flight", 4)])
def test_saturation_by_equal_requests_is_that_of_full_steps(policy: simulate.Policy, rows: int) -> None:
    setup = Setup(A100, slots=rows // 2, rows=rows) if policy == "in-flight" else Setup(A100)
    outcome = simulate.saturation(policy, setup, EQUAL, requests=2000)
    assert outcome.throughput() == pytest.approx(rows / 2 / (20 * A100.step(rows)), rel=0.02)


@pytest.mark.parametrize(("dynamic", "run"), [(True, 3), (False, 4)])
def test_engines_for_fixed_shapes_compute_rows_for_nobody(dynamic: bool, run: int) -> None:
    """Three images without guidance share a step of three rows, or of four where there is no engine for three."""
    mix = Mix(name="few", steps={20: 1}, guided=0)
    setup = Setup(replace(A100, dynamic=dynamic), slots=3, rows=8)
    outcome = simulate.saturation("in-flight", setup, mix, requests=300)
    assert outcome.throughput() == pytest.approx(3 / (20 * A100.step(run)), rel=0.02)
    assert outcome.rows_used / outcome.rows_run == pytest.approx(3 / run, rel=0.01)


def test_rates_in_bounds_lie_where_the_bound_is_met() -> None:
    setup = Setup(A100)
    rate = simulate.bounded_rate("one at a time", setup, EQUAL, requests=4000)
    inside, outside = (
        simulate.simulate("one at a time", setup, EQUAL, factor * rate, requests=4000).within()
        for factor in (0.99, 1.03)
    )
    assert inside >= 0.99 > outside
    assert simulate.highest(lambda rate: rate <= 0.3, 1.0, 0.001) == pytest.approx(0.3, abs=0.002)
    assert simulate.highest(lambda rate: False, 1.0, 0.01) == 0


def test_no_policy_is_faster_than_the_curve_allows() -> None:
    setup = Setup(A100)
    most = simulate.capacity(setup, DRAFT)
    for policy in POLICIES:
        assert simulate.saturation(policy, setup, DRAFT, requests=800).throughput() <= 1.02 * most
    works = DRAFT.draw(20_000, 0)
    expected = 1 / mean(A100.alone(work.rows, work.steps) for work in works)
    assert simulate.alone_rate(setup, DRAFT) == pytest.approx(expected)


def test_encoding_and_decoding_are_paid_for_every_image() -> None:
    costly = Curve("costly", "", "model", "", {1: 0.01, 2: 0.02}, encode=0.5, decode=0.25)
    for policy in POLICIES:
        outcome = simulate.simulate(policy, Setup(costly), EQUAL, 0.2, requests=100)
        assert outcome.busy == pytest.approx(100 * (20 * 0.02 + 0.75))


def test_a_plan_for_any_latency_is_the_rate_over_what_a_device_can_do() -> None:
    setup = Setup(A100, queue=500)
    found = planner.plan(setup, EQUAL, 20.0, 1e6, requests=1000)
    assert found.devices == found.for_rate == math.ceil(20 / found.most) and found.limit == "rate"
    assert found.most == pytest.approx(2.8, rel=0.1)
    assert found.others["one at a time"] == math.ceil(20 * A100.alone(2, 20))


def test_a_plan_meets_its_latency_and_one_device_less_does_not() -> None:
    setup = Setup(A100)
    found = planner.plan(setup, TYPICAL, 6.0, 4.0, requests=1500)
    assert found.limit == "latency" and found.devices > found.for_rate
    assert found.outcome.latency(99) <= 4.0
    worse = simulate.simulate("in-flight", setup, TYPICAL, 6 / (found.devices - 1), requests=1500)
    assert worse.latency(99) > 4.0
    said = planner.text(found, setup, TYPICAL, 6.0, 4.0)
    assert "fewer than 2 rows are extrapolated, not published" in said
    assert "published by others, not measured here" in said and "Poisson" in said
    assert found.as_record()["devices"] == found.devices


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"slots": 16, "rows": 8}, "rows is 8: give a whole number from 16"),
        ({"slots": 600, "rows": 600}, "slots is 600"),
        ({"slots": 1, "rows": 1}, "rows is 1"),
        ({"queue": 0}, "max_waiting is 0"),
    ],
)
def test_numbers_that_no_batcher_takes_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Setup(A100, **numbers)
    with pytest.raises(RequestError, match=message):
        process.Place("in-flight", "a100-sd15", **numbers)


def test_a_static_batch_has_the_rows_of_a_batcher() -> None:
    assert LINEAR.times(Setup(LINEAR).buckets).knee() == 1 and Setup(LINEAR).knee == 2


def test_what_an_idle_device_cannot_do_no_number_can() -> None:
    with pytest.raises(RequestError, match=r"p99 is 1 s: 1 % of the mix typical take 1.1 s or more on an idle device"):
        planner.plan(Setup(A100), TYPICAL, 1.0, 1.0, requests=500)
    for rate, p99 in ((0.0, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(RequestError, match="give a number above 0"):
            planner.plan(Setup(A100), TYPICAL, rate, p99)


def test_the_fewest_are_found() -> None:
    for needed in (1, 2, 5, 64, 100):
        assert planner.fewest(lambda count, needed=needed: count >= needed, 1) == needed  # type: ignore[misc]
    assert planner.fewest(lambda count: False, 3) is None


def test_the_same_seed_gives_the_same_requests_at_every_rate() -> None:
    mix = Mix(name="mine", steps={4: 1, 9: 3}, samplers={"ddim": 1}, guided=0.5)
    assert mix.draw(50, 1) == mix.draw(80, 1)[:50] != mix.draw(50, 2)
    slow, fast = (
        simulate.simulate("one at a time", Setup(A100), mix, rate, requests=50).entries for rate in (0.1, 0.2)
    )
    assert [entry.arrived for entry in slow] == pytest.approx([2 * entry.arrived for entry in fast])
    assert all(later.arrived >= earlier.arrived for earlier, later in pairwise(slow))


@pytest.mark.parametrize("load", [0.3, 0.7, 0.95, 1.5])
@pytest.mark.parametrize(
    "name", ["a100-sd15", *(pytest.param(name, marks=pytest.mark.long) for name in ("cpu-embedded", "h200-qwen512"))]
)
def test_the_batcher_says_about_how_long_a_request_takes(name: str, load: float) -> None:
    for mix, slots in ((DRAFT, 8), (TYPICAL, 16), (EQUAL, 16)):
        setup = Setup(curve(name), slots, 16)
        rate = load * simulate.saturation("in-flight", setup, mix, requests=200).throughput()
        outcome = simulate.simulate("in-flight", setup, mix, rate, requests=300, foresee=True)
        ratios = [entry.foreseen / entry.latency for entry in outcome.counted if math.isfinite(entry.latency)]
        assert 0.8 <= median(ratios) <= 1.25, (mix.name, slots)
