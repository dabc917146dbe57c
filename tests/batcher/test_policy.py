"""Who is admitted and how wide a step is, with curves and clocks that are made up."""

from __future__ import annotations

import random

import pytest
from latentrt.runtime.batcher.policy import PATIENCE, SLACK, UNSETTLED, Candidate, StepTimes, decide, due

FLAT = StepTimes((2, 4, 8), {2: 1.0, 4: 1.1, 8: 1.2})
"""A device on which a wide step costs little more."""
STEEP = StepTimes((2, 4, 8), {2: 1.0, 4: 1.9, 8: 3.9})
"""One that is full with four rows."""


def admitted(waiting: list[Candidate], used: int, free: int, times: StepTimes) -> list[int]:
    """Return who gets a slot beside images that are due long before, of one row each."""
    running = [Candidate(-1e9, 1, 1)] * used
    return list(decide(waiting, running, times, 0.0, slots=used + free).admit)


def guided(arrived: float, evaluations: int = 20) -> Candidate:
    return Candidate(arrived, 2, evaluations)


def test_a_bucket_is_the_smallest_that_holds_the_rows() -> None:
    assert [FLAT.bucket(rows) for rows in (1, 2, 3, 4, 5, 8)] == [2, 2, 4, 4, 8, 8]


def test_first_runs_of_a_bucket_are_not_timed_and_later_ones_are_averaged() -> None:
    times = StepTimes((2,))
    for _ in range(UNSETTLED):
        times.add(2, 100.0)
    assert times.seconds == {}
    times.add(2, 1.0)
    times.add(2, 2.0)
    assert times.seconds[2] == pytest.approx(1.2)


def test_a_bucket_without_a_time_is_guessed_from_its_neighbour() -> None:
    times = StepTimes((2, 4, 8), {2: 1.0})
    assert (times.of(1), times.of(4), times.of(8)) == (1.0, 2.0, 4.0)
    assert StepTimes((2, 4)).of(4) == 0.0


@pytest.mark.parametrize(
    ("seconds", "knee"),
    [
        ({2: 1.0, 4: 1.1, 8: 1.2}, 8),
        ({2: 1.0, 4: 1.9, 8: 3.9}, 2),  # 2.0, 2.1, 2.05 rows a second
        ({2: 1.0, 4: 1.8, 8: 3.7}, 4),
        ({2: 1.0, 4: 1.8, 8: 3.3}, 8),
        ({2: 1.0, 4: 3.0, 8: 9.0}, 2),
        ({}, 2),
        ({2: 1.0}, 4),  # the next is tried
        ({2: 1.0, 8: 9.0}, 4),
        ({2: 1.0, 4: 1.5}, 8),
    ],
)
def test_the_knee_is_where_more_rows_stop_to_pay(seconds: dict[int, float], knee: int) -> None:
    assert StepTimes((2, 4, 8), seconds).knee() == knee


def test_all_rows_are_used_when_more_waits_and_the_last_few_per_cent_count() -> None:
    gains = StepTimes((2, 4, 8), {2: 1.0, 4: 1.8, 8: 3.45})  # 2.22 and 2.32 rows a second: 4 is enough, 8 gains 4 %
    gainless = StepTimes((2, 4, 8), {2: 1.0, 4: 1.8, 8: 3.6})
    assert [gains.most(wanted) for wanted in (2, 4, 5, 9)] == [4, 4, 8, 8]
    assert gainless.most(9) == 4


def test_the_earliest_due_comes_first_and_ties_in_order_of_arrival() -> None:
    long, short, other = guided(0.0, 50), guided(10.0, 4), guided(10.0, 4)
    assert admitted([long, short, other], 0, 2, FLAT) == [1, 2]
    late = guided(0.0 + SLACK * 50, 4)
    assert admitted([late, long], 0, 1, FLAT) == [1]


def test_slack_is_bounded_so_that_long_ones_are_not_passed_over_for_ever() -> None:
    assert due(guided(5.0, 1_000_000), FLAT) == 5.0 + PATIENCE
    assert due(guided(5.0, 2), FLAT) == 5.0 + SLACK * 2


def test_nobody_is_admitted_out_of_turn() -> None:
    wide, narrow = guided(0.0), Candidate(1.0, 1, 20)
    assert admitted([wide, narrow], 7, 3, FLAT) == []
    assert admitted([narrow, wide], 6, 3, FLAT) == [1]
    assert admitted([narrow], 7, 3, FLAT) == [0]


@pytest.mark.parametrize(("used", "free", "count"), [(0, 8, 4), (0, 3, 3), (4, 8, 2), (8, 8, 0), (0, 0, 0)])
def test_rows_and_slots_bound_what_is_admitted(used: int, free: int, count: int) -> None:
    assert admitted([guided(i) for i in range(9)], used, free, FLAT) == list(range(count))


def test_one_image_runs_whatever_the_knee_says() -> None:
    full = StepTimes((1, 2), {1: 1.0, 2: 10.0})
    assert full.knee() == 1
    assert admitted([guided(0.0), guided(0.0)], 0, 2, full) == [0]


def test_a_crowd_stops_at_the_knee() -> None:
    assert admitted([guided(i) for i in range(9)], 0, 4, STEEP) == [0]


def test_waiting_is_work_over_pace() -> None:
    assert FLAT.wait(80) == pytest.approx(80 / 8 * 1.2)
    assert STEEP.wait(80) == pytest.approx(80 / 2 * 1.0)
    assert StepTimes((2, 4)).wait(80) is None


def simulate(times: StepTimes, seed: int, load: float) -> list[tuple[float, Candidate]]:
    """Run a day's images through the policy, on a clock of its own; return when each was done."""
    choose, clock = random.Random(seed), 0.0
    arrivals = []
    for _ in range(300):
        clock += choose.expovariate(load)
        arrivals.append(Candidate(clock, choose.choice((1, 2, 2)), choose.choice((4, 20, 50))))
    clock, waiting, running, done = 0.0, list[Candidate](), list[list[object]](), list[tuple[float, Candidate]]()
    left = list(arrivals)
    while left or waiting or running:
        while left and left[0].arrived <= clock:
            waiting.append(left.pop(0))
        used = sum(each[0].rows for each in running)  # type: ignore[attr-defined]
        chosen = admitted(waiting, used, 4 - len(running), times)
        assert len(set(chosen)) == len(chosen)
        running += [[waiting[index], waiting[index].evaluations] for index in chosen]
        waiting = [each for index, each in enumerate(waiting) if index not in chosen]
        if not running:
            clock = left[0].arrived
            continue
        used = sum(each[0].rows for each in running)  # type: ignore[attr-defined]
        assert used <= times.buckets[-1] and len(running) <= 4
        clock += times.of(used)
        for each in running:
            each[1] -= 1  # type: ignore[operator]
        done += [(clock, each[0]) for each in running if each[1] == 0]  # type: ignore[misc]
        running = [each for each in running if each[1]]
    assert len(done) == len(arrivals)
    return done


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_everyone_is_served_and_short_ones_wait_less(curve: StepTimes) -> None:
    pace = curve.knee() / curve.of(curve.knee())
    done = simulate(curve, seed=1, load=0.8 * pace / (1.7 * 24.7))
    waits = {n: [end - c.arrived for end, c in done if c.evaluations == n] for n in (4, 50)}
    assert sum(waits[4]) / len(waits[4]) < sum(waits[50]) / len(waits[50])
    assert max(end - c.arrived for end, c in done) < 60 * 50 * curve.of(2)
