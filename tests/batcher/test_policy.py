"""Who is admitted and how wide a step is, with curves and clocks that are made up."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from latentrt.runtime.batcher.policy import (
    PATIENCE,
    SLACK,
    SPARED,
    Candidate,
    Decision,
    decide,
    due,
    outlook,
    until_done,
)
from latentrt.runtime.batcher.queue import Turns
from latentrt.runtime.batcher.times import LEARNT, STALL, UNSETTLED, StepTimes
from latentrt.runtime.loop.widths import rows_of

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


def test_first_runs_of_a_bucket_are_not_timed_and_those_after_them_are_averaged() -> None:
    times = StepTimes((2,))
    for _ in range(UNSETTLED):
        times.add(2, 100.0)
    assert times.seconds == {}
    for number in range(1, LEARNT + 1):
        times.add(2, float(number))
        assert times.seconds[2] == pytest.approx((number + 1) / 2)


def settled(seconds: dict[int, float]) -> StepTimes:
    """Return times whose next steps count."""
    times = StepTimes(tuple(seconds))
    for bucket, each in seconds.items():
        times.set(bucket, each)
    return times


@pytest.mark.parametrize("speed", [1 / 1.5, 1.5, 2.5])
@pytest.mark.parametrize("used", [2, 8])
def test_a_device_that_changes_its_speed_does_so_at_every_width(used: int, speed: float) -> None:
    """Also at widths that are not in use: old times of theirs would make those look good, or bad for ever."""
    curve = {2: 1.0, 4: 1.8, 8: 3.7}
    times = settled(curve)
    for _ in range(60):
        times.add(used, curve[used] / speed)
    assert [times.seconds[bucket] * speed for bucket in curve] == pytest.approx(list(curve.values()), rel=0.01)
    assert times.knee() == 4


def test_a_stall_changes_no_width_and_is_soon_forgotten() -> None:
    curve = {2: 1.0, 4: 1.8, 8: 3.7}
    times = settled(curve)
    times.add(4, 100.0)
    assert times.knee() == 4 and times.seconds[2] == pytest.approx(1 + 0.2 * (STALL - 1))
    for _ in range(20):
        times.add(4, 1.8)
    assert list(times.seconds.values()) == pytest.approx(list(curve.values()), rel=0.01)


def test_noise_changes_no_width() -> None:
    curve = {2: 1.0, 4: 1.84, 8: 3.62}  # 4 rows are 8.7 % better than 2, and 8 another 1.7 %
    times, knees, generator = settled(curve), set[int](), random.Random(0)
    for _ in range(2000):
        bucket = generator.choice((2, 4))
        times.add(bucket, curve[bucket] * generator.lognormvariate(0, 0.06))
        knees.add(times.knee())
    assert knees == {4}


def test_a_place_on_the_curve_that_is_wrong_is_mended_while_it_is_used() -> None:
    times = settled({2: 1.0, 4: 1.2})  # a step of 4 rows takes 1.9
    for _ in range(3000):
        times.add(2, 1.0)
        times.add(4, 1.9)
    assert times.seconds[4] / times.seconds[2] == pytest.approx(1.9, rel=0.02)


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
        ({2: 1.0, 4: 1.85, 8: 3.7}, 4),  # 92 % of the best, and a climb of 8.1 %
        ({2: 1.0, 4: 1.86, 8: 3.7}, 2),  # of 7.5 %
        ({2: 1.0, 4: 1.83, 8: 3.35}, 8),  # two climbs
        ({2: 1.0, 4: 3.0, 8: 9.0}, 2),
        ({}, 2),
        ({2: 1.0}, 4),  # the next is tried
        ({2: 1.0, 8: 9.0}, 4),
        ({2: 1.0, 4: 1.5}, 8),
    ],
)
def test_the_knee_is_where_more_rows_stop_to_pay(seconds: dict[int, float], knee: int) -> None:
    assert StepTimes((2, 4, 8), seconds).knee() == knee


def test_a_climb_is_that_of_twice_the_rows() -> None:
    assert StepTimes((4, 6), {4: 1.0, 6: 1.42}).knee() == 6  # 5.6 % more for half as many rows again
    assert StepTimes((4, 8), {4: 1.0, 8: 1.894}).knee() == 4  # as much for twice as many


def test_more_rows_are_used_when_much_waits_and_the_last_few_per_cent_count() -> None:
    gains = StepTimes((2, 4, 8), {2: 1.0, 4: 1.8, 8: 3.45})  # 2.22 and 2.32 rows a second: 4 is enough, 8 gains 4 %
    gainless = StepTimes((2, 4, 8), {2: 1.0, 4: 1.8, 8: 3.6})
    assert [gains.most(wanted) for wanted in (2, 4, 9, 15, 16, 99)] == [4, 4, 4, 4, 8, 8]
    assert gainless.most(99) == 4


def test_the_earliest_due_comes_first_and_ties_in_order_of_arrival() -> None:
    long, short, other = guided(0.0, 50), guided(10.0, 4), guided(10.0, 4)
    assert admitted([long, short, other], 0, 2, FLAT) == [1, 2]
    late = guided(0.0 + SLACK * 50, 4)
    assert admitted([late, long], 0, 1, FLAT) == [1]


def test_slack_is_bounded_so_that_long_ones_are_not_passed_over_for_ever() -> None:
    assert due(guided(5.0, 1_000_000), FLAT) == 5.0 + PATIENCE * FLAT.of(2)
    twice = StepTimes((2,), {2: 2.0})
    assert due(guided(0.0, 1_000_000), twice) == 2 * due(guided(0.0, 1_000_000), FLAT)
    assert due(guided(5.0, 2), FLAT) == 5.0 + SLACK * 2


def test_nobody_is_admitted_out_of_turn() -> None:
    wide, narrow = guided(0.0), Candidate(1.0, 1, 20)
    assert admitted([wide, narrow], 7, 3, FLAT) == []
    assert admitted([narrow, wide], 6, 3, FLAT) == [1]
    assert admitted([narrow], 7, 3, FLAT) == [0]


def test_narrow_images_take_the_rows_that_the_next_one_cannot_use() -> None:
    wide, narrow, later = guided(0.0), Candidate(1.0, 1, 20), Candidate(2.0, 1, 20)
    running = [under_way(guided(-1e9), 3), *[under_way(Candidate(-1e9, 1, 20), 3)] * 5]
    assert decide([later, wide, narrow], running, FLAT, 5.0, slots=9) == Decision((), (2,), 8)
    assert decide([later, wide, narrow], running, FLAT, 5.0, slots=6).admit == ()
    assert decide([wide, narrow], [running[1]] * 7, FLAT, 5.0, slots=9).admit == ()  # nobody's end would make room
    assert decide([guided(0.0), guided(1.0), narrow], running[1:], FLAT, 5.0, slots=9) == Decision((), (0, 2), 8)


def test_rows_are_two_for_each_slot_as_far_as_eight_and_then_one() -> None:
    assert [rows_of(slots) for slots in (1, 3, 4, 5, 8, 9, 64)] == [2, 6, 8, 8, 8, 9, 64]


def in_part(done: int = 0) -> Candidate:
    """An image with two rows in 4 evaluations of 10."""
    return Candidate(0.0, 2, 10, done, range(3, 7))


def test_an_image_that_is_guided_in_part_costs_what_it_has() -> None:
    plan = [2 if number in range(3, 7) else 1 for number in range(10)]
    times = StepTimes((1, 2), {1: 1.0, 2: 3.0})
    for done in range(10):
        now = in_part(done)
        assert (now.width, now.held, now.work) == (plan[done], max(plan[done:]), sum(plan[done:]))
        assert now.alone(times, done) == sum({1: 1.0, 2: 3.0}[rows] for rows in plan[done:])
    assert due(in_part(), times) == SLACK * (6 * 1.0 + 4 * 3.0)
    assert until_done([in_part(6)], (), (), times, 4) == 3.0 + 3 * 1.0
    assert Candidate(0.0, 2, 10, 4, range(0)).held == Candidate(0.0, 1, 10, 4, range(3, 7)).held == 1


def test_rows_are_kept_for_who_is_to_have_them_and_free_from_then_on() -> None:
    others = [under_way(guided(0.0), 3)] * 3
    assert decide([guided(0.0)], [*others, in_part(1)], FLAT, 5.0, slots=9) == Decision((), (), 8)
    assert decide([Candidate(0.0, 1, 20)], [*others, in_part(7)], FLAT, 5.0, slots=9) == Decision((), (0,), 8)
    assert decide([], [in_part(1), in_part(7)], FLAT, 5.0, slots=9).bucket == 2
    assert decide([in_part()], [in_part(1)], FLAT, 5.0, slots=9) == Decision((), (0,), 2)


@pytest.mark.parametrize(("used", "free", "count"), [(0, 8, 4), (0, 3, 3), (4, 8, 2), (8, 8, 0), (0, 0, 0)])
def test_rows_and_slots_bound_what_is_admitted(used: int, free: int, count: int) -> None:
    assert admitted([guided(i) for i in range(9)], used, free, FLAT) == list(range(count))


def test_one_image_runs_whatever_the_knee_says() -> None:
    full = StepTimes((1, 2), {1: 1.0, 2: 10.0})
    assert full.knee() == 1
    assert admitted([guided(0.0), guided(0.0)], 0, 2, full) == [0]


def test_a_crowd_stops_at_the_knee() -> None:
    assert admitted([guided(i) for i in range(7)], 0, 4, STEEP) == [0]
    assert admitted([guided(i) for i in range(9)], 0, 4, STEEP) == [0, 1]  # much waits, and two gain 5 %


def test_waiting_is_work_over_pace() -> None:
    assert FLAT.wait(80) == pytest.approx(80 / 8 * 1.2)
    assert STEEP.wait(80) == pytest.approx(80 / 2 * 1.0)
    assert StepTimes((2, 4)).wait(80) is None


ONE_SLOT = StepTimes((2,), {2: 1.0})
LATE, SOON = guided(0.0, 50), guided(3.0, 4)
"""Due at 240 and at 35."""


def under_way(candidate: Candidate, done: int) -> Candidate:
    return replace(candidate, done=done)


def test_an_image_that_is_due_earlier_takes_the_place_of_one_that_is_due_later() -> None:
    assert decide([SOON], [under_way(LATE, 3)], ONE_SLOT, 3.0, slots=1) == Decision((0,), (0,), 2)
    assert decide([LATE], [under_way(SOON, 1)], ONE_SLOT, 3.0, slots=1) == Decision((), (), 2)


def test_what_left_its_slot_goes_on_when_it_is_its_turn_again() -> None:
    back = under_way(LATE, 3)
    assert decide([back], [], ONE_SLOT, 9.0, slots=1) == Decision((), (0,), 2)
    assert decide([guided(220.0, 4), back], [], ONE_SLOT, 9.0, slots=1) == Decision((), (1,), 2)


@pytest.mark.parametrize(("done", "leaves"), [(47, True), (50 - SPARED, False), (49, False)])
def test_an_image_that_is_nearly_done_keeps_its_slot(done: int, leaves: bool) -> None:
    assert bool(decide([SOON], [under_way(LATE, done)], ONE_SLOT, 3.0, slots=1).swap_out) is leaves


@pytest.mark.parametrize(("later", "leaves"), [(SPARED, False), (SPARED + 0.5, True)])
def test_nobody_leaves_a_slot_for_one_that_is_due_about_as_soon(later: float, leaves: bool) -> None:
    here, other = guided(later, 20), guided(0.0, 20)
    assert bool(decide([other], [under_way(here, 1)], ONE_SLOT, 5.0, slots=1).swap_out) is leaves


def test_as_few_leave_as_need_to_and_the_latest_due_first() -> None:
    running = [under_way(Candidate(arrived, 1, 50), 2) for arrived in (5.0, 7.0, 6.0)]
    times = StepTimes((2, 3), {2: 1.0, 3: 1.0})
    assert decide([SOON], running, times, 9.0, slots=3) == Decision((1, 2), (0,), 3)
    assert decide([Candidate(3.0, 1, 4)], running, times, 9.0, slots=3) == Decision((1,), (0,), 3)
    assert decide([Candidate(3.0, 1, 4)] * 2, running, times, 9.0, slots=3) == Decision((1, 2), (0, 1), 3)


def test_only_so_many_images_are_beside_the_slots() -> None:
    running = [under_way(LATE, 3)] * 2
    places = [decide([SOON] * 2, running, FLAT, 3.0, slots=2, parking=most).swap_out for most in (0, 1, 2)]
    assert places == [(), (1,), (1, 0)]
    beside = [under_way(LATE, 9)] * 2
    assert decide([SOON, *beside], running, FLAT, 3.0, slots=2).swap_out == ()


def test_nothing_to_do_is_no_step() -> None:
    assert decide([], [], FLAT, 0.0, slots=4) == Decision((), (), 0)
    assert decide([], [guided(0.0)] * 2, FLAT, 0.0, slots=4) == Decision((), (), 4)


def test_an_estimate_follows_the_steps_that_images_share() -> None:
    own = [guided(0.0, 10)]
    assert until_done(own, (), (), FLAT, 4) == 10.0  # alone
    assert until_done([under_way(own[0], 4)], (), (), FLAT, 4) == 6.0
    assert until_done(own, [guided(9.0)] * 3, (), FLAT, 4) == pytest.approx(10 * 1.2)  # all have a slot
    assert until_done(own, [guided(-99.0, 10)] * 8, (), FLAT, 4) == pytest.approx(2 * 10 * 1.2 + 10)
    assert until_done(own, [guided(-99.0, 10)] * 400, (), FLAT, 4) == pytest.approx(100 * 10 * 1.2 + 10)
    assert until_done(own * 16, (), (), FLAT, 4) == pytest.approx(4 * 10 * 1.2)
    assert until_done(own, (), (3.0, 100.0), FLAT, 4) == 10.0 + 3.0 + 10.0
    assert until_done(own, (), (), StepTimes((2,)), 4) is None


def test_an_estimate_expects_company_where_there_was_some() -> None:
    times = StepTimes((2, 4, 8), FLAT.seconds)
    for _ in range(UNSETTLED + 1):
        times.add(8, 1.2)
    assert until_done([guided(0.0, 10)], (), (), times, 4) == pytest.approx(10 * 1.1)
    for _ in range(500):
        times.add(2, 1.0)
    assert times.lately == pytest.approx(1.0, rel=1e-4)


def test_an_estimate_counts_what_steps_wait_for() -> None:
    times = StepTimes((2, 4, 8), FLAT.seconds)
    for seconds in (0.5, 0.5):
        times.note("encode", seconds)
    times.note("decode", 2.0)
    assert until_done([guided(0.0, 10)], (), (), times, 1) == pytest.approx(0.5 + 10 + 2)
    assert until_done([guided(0.0, 10)], [under_way(guided(-99.0, 10), 7)], (), times, 1) == pytest.approx(5 + 12.5)


def test_room_is_when_those_that_wait_have_got_slots() -> None:
    running, waiting = [under_way(guided(-99.0, 10), 7)] * 2, [guided(float(place), 10) for place in range(3)]
    begins, ends = outlook([*running, *waiting], FLAT, 2)
    assert begins == pytest.approx([0, 0, 3.3, 3.3, 14.3]) and ends == pytest.approx([3.3, 3.3, 14.3, 14.3, 24.3])
    assert outlook([*running, *waiting], FLAT, 2, own=2)[1][2:] == [math.inf] * 3


def test_sizes_get_equal_shares_of_the_time() -> None:
    turns, spent = Turns[str](), {"large": 0.0, "small": 0.0, "other": 0.0}
    cost = {"large": 10.0, "small": 1.0, "other": 3.0}
    for _ in range(300):
        key = turns.next(list(spent))
        turns.spend(key, cost[key])
        spent[key] += cost[key]
        assert max(spent.values()) - min(spent.values()) <= max(cost.values())
    assert min(spent.values()) > 0


def test_a_size_that_was_away_does_not_make_up_for_it() -> None:
    turns = Turns[str]()
    for _ in range(100):
        turns.spend(turns.next(["one"]), 1.0)
    order = []
    for _ in range(6):
        order.append(turns.next(["one", "other"]))
        turns.spend(order[-1], 1.0)
    assert sorted(order) == ["one"] * 3 + ["other"] * 3
    turns.forget("one")
    turns.spend(turns.next(["one", "other"]), 1.0)


def test_a_size_that_comes_while_none_is_busy_holds_up_none_that_was_long_there() -> None:
    turns, order = Turns[str](), list[str]()
    for key in (*["long"] * 1000, "new"):
        turns.spend(turns.next([key]), 1.0)
    for _ in range(20):
        order.append(turns.next(["long", "new"]))
        turns.spend(order[-1], 1.0)
    assert all(one != other for one, other in pairwise(order))


class Day:
    """A day of images that go through the policy, on a clock of its own."""

    def __init__(self, times: StepTimes, seed: int, load: float) -> None:
        choose, clock = random.Random(seed), 0.0
        self.swaps, self.done = 0, list[tuple[float, Candidate]]()
        left, waiting, running = list[Candidate](), list[Candidate](), list[Candidate]()
        for _ in range(300):
            clock += choose.expovariate(load)
            left.append(Candidate(clock, choose.choice((1, 2, 2)), choose.choice((4, 20, 50))))
        self.arrivals, clock = tuple(left), 0.0
        while left or waiting or running:
            while left and left[0].arrived <= clock:
                waiting.append(left.pop(0))
            decision = decide(waiting, running, times, clock, slots=4)
            assert len(set(decision.admit)) == len(decision.admit)
            self.swaps += len(decision.swap_out)
            stay = [each for index, each in enumerate(running) if index not in decision.swap_out]
            gone = [running[index] for index in decision.swap_out]
            running = stay + [waiting[index] for index in decision.admit]
            waiting = [each for index, each in enumerate(waiting) if index not in decision.admit] + gone
            if not running:
                assert not waiting
                clock = left[0].arrived
                continue
            used = sum(each.rows for each in running)
            assert used <= decision.bucket <= times.buckets[-1] and len(running) <= 4
            assert sum(each.done > 0 for each in waiting) <= 4
            clock += times.of(used)
            running = [replace(each, done=each.done + 1) for each in running]
            self.done += [(clock, each) for each in running if not each.left]
            running = [each for each in running if each.left]
        assert len(self.done) == len(self.arrivals)


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_everyone_is_served_and_short_ones_wait_less(curve: StepTimes) -> None:
    pace = curve.knee() / curve.of(curve.knee())
    day = Day(curve, seed=1, load=0.8 * pace / (1.7 * 24.7))
    waits = {n: [end - c.arrived for end, c in day.done if c.evaluations == n] for n in (4, 50)}
    assert sum(waits[4]) / len(waits[4]) < sum(waits[50]) / len(waits[50])
    assert max(end - c.arrived for end, c in day.done) < 60 * 50 * curve.of(2)
    assert 0 < day.swaps < len(day.arrivals)  # each swap is for one that came


@pytest.mark.parametrize("load", [1.5, 4.0])
def test_an_overload_does_not_move_images_about(load: float) -> None:
    day = Day(FLAT, seed=2, load=load * FLAT.knee() / FLAT.of(8) / (1.7 * 24.7))
    assert day.swaps < len(day.arrivals)


def test_the_knee_leaves_no_row_that_a_crowd_with_guidance_cannot_use() -> None:
    times = StepTimes((1, 2, 3, 4, 5, 6), {rows: 1 + 0.1 * rows for rows in range(1, 5)} | {5: 1.5, 6: 1.85})
    assert times.knee() == 6
    assert StepTimes((1, 2, 3), {1: 1.0, 2: 1.9, 3: 2.4}).knee() == 3
