"""Who comes next and how wide a step is: pure functions of what waits, what runs and how long steps take.

The numbers were chosen by simulation, on curves of GPUs and of a processor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .times import StepTimes

SLACK = 8.0
"""An image is due when it has been there for so many times what it takes alone: short ones overtake long ones."""
PATIENCE = 240
"""Slack at most, in steps of two rows: no image waits longer for shorter ones, on a device of any speed."""
SPARED = 2
"""An image with no more evaluations left keeps its slot, and none leaves it for one that is due fewer steps earlier."""
NEAR = 256
"""Images that an estimate follows one by one: of those before them it counts the work alone."""


@dataclass(frozen=True)
class Candidate:
    """An image: when it came (seconds), its network rows, and how often it has the network evaluated.

    `done` evaluations are behind it: of an image that waits, those it had before it left its slot to another. Those of
    `guided` take all of its rows, and the others one less; None: all do.
    """

    arrived: float
    rows: int
    evaluations: int
    done: int = 0
    guided: range | None = None

    @property
    def left(self) -> int:
        """Evaluations that are still to come."""
        return self.evaluations - self.done

    @property
    def width(self) -> int:
        """Network rows of its next evaluation."""
        return self.rows if self.guided is None or self.done in self.guided else self.rows - 1

    @property
    def alike(self) -> int:
        """Evaluations that are to come before one of another width."""
        borders = () if self.guided is None else (self.guided.start, self.guided.stop)
        return next((border for border in borders if border > self.done), self.evaluations) - self.done

    @property
    def held(self) -> int:
        """The most network rows that it is still to have: they are kept for it, so that no image waits in its run."""
        return self.rows if self.guided is None or self.done < self.guided.stop else self.rows - 1

    @property
    def work(self) -> int:
        """Network rows times evaluations that are still to come."""
        return self._wide(self.done) + self.left * (self.rows - 1)

    def alone(self, times: StepTimes, since: int = 0) -> float:
        """Return the seconds of its evaluations from one on, were it drawn by itself."""
        wide = self._wide(since)
        narrow = self.evaluations - since - wide
        return wide * times.of(self.rows) + (narrow * times.of(self.rows - 1) if narrow else 0.0)

    def _wide(self, since: int) -> int:
        """Return how many evaluations from one on take all rows."""
        guided = range(self.evaluations) if self.guided is None else self.guided
        return len(range(max(since, guided.start), guided.stop))


@dataclass(frozen=True)
class Decision:
    """What happens before the next step, and how wide that is.

    swap_out   which of the running images leave their slots first, to go on later
    admit      which of the waiting images then get slots, in this order
    bucket     the network rows that the step computes, 0 when nothing runs
    """

    swap_out: tuple[int, ...]
    admit: tuple[int, ...]
    bucket: int


def outlook(
    candidates: Sequence[Candidate], times: StepTimes, slots: int, own: int = 0
) -> tuple[list[float], list[float]]:
    """Return when images of one size begin and end, in seconds from now.

    The earliest due have the slots. None comes after them, but a step takes longer than its rows where steps did of
    late, half of the difference: others will come, and share it. Ends once the first `own` images are over, or with
    none once all are: what has not happened by then is infinite.
    """
    begins, ends = ([math.inf] * len(candidates) for _ in range(2))
    seen = list(candidates)
    line = deque(sorted(range(len(seen)), key=lambda index: due(seen[index], times)))
    behind = sum(candidate.held for candidate in seen)  # the rows of those in the line
    awaited = set(range(own or len(seen)))
    running: list[int] = []
    now = 0.0
    while awaited:
        held = sum(seen[index].held for index in running)
        most = times.most(held + behind) if line else 0
        while line and len(running) < slots and (not running or held + seen[line[0]].held <= most):
            running.append(index := line.popleft())
            begins[index] = now
            now += 0.0 if seen[index].done else times.beside["encode"]
            held, behind = held + seen[index].held, behind - seen[index].held
        steps = min(seen[index].alike for index in running)
        step = times.of(sum(seen[index].width for index in running))
        now += steps * max(step, (step + times.lately) / 2)
        for index in running.copy():
            seen[index] = replace(seen[index], done=seen[index].done + steps)
            if not seen[index].left:
                now += times.beside["decode"]
                ends[index] = now
                running.remove(index)
                awaited.discard(index)
    return begins, ends


def until_done(
    own: Sequence[Candidate], others: Sequence[Candidate], elsewhere: Sequence[float], times: StepTimes, slots: int
) -> float | None:
    """Return about how many seconds it takes until images of one request are done, None before any step was timed.

    `others` are all other images of their size, and `elsewhere` the seconds of work of other sizes: those take as much
    time meanwhile, as far as they have something to do.
    """
    if not times.seconds:
        return None
    last = max((due(each, times) for each in own), default=0.0)
    line = sorted(others, key=lambda each: due(each, times))
    before = sum(due(each, times) <= last for each in line)
    far = max(0, before - NEAR)
    seconds = times.wait(sum(each.work for each in line[:far])) or 0.0
    _, ends = outlook([*own, *line[far : before + slots]], times, slots, len(own))
    return shared(seconds + max(ends[: len(own)], default=0.0), elsewhere)


def shared(seconds: float, elsewhere: Sequence[float]) -> float:
    """Return how long takes what takes so many seconds alone, beside the work of other sizes in seconds."""
    return seconds + sum(min(other, seconds) for other in elsewhere)


def due(candidate: Candidate, times: StepTimes) -> float:
    """Return when an image is due, in the seconds of its arrival."""
    return candidate.arrived + min(SLACK * candidate.alone(times), PATIENCE * times.of(2))


def decide(
    waiting: Sequence[Candidate],
    running: Sequence[Candidate],
    times: StepTimes,
    now: float,
    *,
    slots: int,
    parking: int | None = None,
) -> Decision:
    """Return what to do before the next step, of images of one size in so many slots; the earliest due goes first.

    `now` is in the seconds of arrivals. Where there is no room, running images that are due later leave their slots, as
    long as no more than `parking` images (default: as many as slots) wait to go on. Behind an image that does not fit
    only narrower ones are admitted, into the rows that it cannot use, and only while one runs whose end makes room for
    it. One image always runs, however wide. Rows that an image is to have later are kept for it.
    """
    used, free = sum(candidate.held for candidate in running), slots - len(running)
    run = sum(candidate.width for candidate in running)
    if not waiting:
        return Decision((), (), times.bucket(run) if run else 0)
    most, widest = times.most(used + sum(candidate.held for candidate in waiting)), times.buckets[-1]
    places = (slots if parking is None else parking) - sum(candidate.done > 0 for candidate in waiting)
    spared = SPARED * times.of(run) if run else 0.0
    dues = [due(candidate, times) for candidate in waiting]
    last = sorted((due(each, times), index) for index, each in enumerate(running) if each.left > SPARED)
    admit: list[int] = []
    leave: list[int] = []
    blocked = widest + 1  # rows of the first image that does not fit
    for index in sorted(range(len(waiting)), key=dues.__getitem__):
        rows, gone, left = waiting[index].held, 0, 0
        if rows >= blocked:
            continue
        while free + gone < 1 or used - left + rows > (most if used > left else widest):
            if blocked <= widest or gone >= min(places, len(last)) or last[-1 - gone][0] - dues[index] <= spared:
                break
            gone += 1
            left += running[last[-gone][1]].held
        else:
            leave += [last.pop()[1] for _ in range(gone)]
            admit.append(index)
            free, used, places = free + gone - 1, used - left + rows, places - gone
            continue
        if free < 1 or used >= most or not any(each.held >= rows for each in _there(waiting, running, admit, leave)):
            break
        blocked = min(blocked, rows)
    run = sum(each.width for each in _there(waiting, running, admit, leave))
    return Decision(tuple(leave), tuple(admit), times.bucket(run))


def _there(
    waiting: Sequence[Candidate], running: Sequence[Candidate], admit: Sequence[int], leave: Sequence[int]
) -> list[Candidate]:
    """Return who runs then."""
    return [each for place, each in enumerate(running) if place not in leave] + [waiting[place] for place in admit]
