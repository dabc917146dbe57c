"""How long steps take by their width, as a device that changes its speed takes them, and which widths are good.

Throughput grows with rows up to some width, the knee of the curve: a crowd beyond it makes everyone slower and nobody
faster. So rows are given up to the knee, and beyond it only while so much waits that the last few per cent count. The
numbers were chosen by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

GOOD = 0.9
"""The part of the best throughput that the knee of the curve gives at least."""
STEEP = 1.08
"""Where throughput climbs so much for twice the rows from one width to the next, the wider one is taken."""
FULL = 0.99
"""The part of the best throughput that is given while much waits."""
MUCH = 2
"""Much waits when all rows that are wanted would fill the widest step so many times."""
UNSETTLED = 4
"""First runs of a bucket that are not timed: on each of two sets of buffers one allocates and the next one captures."""
LEARNT = 8
"""Runs of a bucket that give its place on the curve; later ones tell how fast the device is, at every width."""
FADING = 0.2
"""Share of the newest time in a mean."""
DRIFT = 0.001
"""Share of the newest time in a bucket's place on the curve, once learnt: noise would change widths for nothing."""
STALL = 2.0
"""A step that takes so many times as long as it should, or longer, is a stall: it tells no more than this."""
LATELY = 0.02
"""Share of the newest time in the mean of what steps of any width took: about the last fifty."""


class StepTimes:
    """How long a step takes by its bucket, the number of network rows that are computed.

    Devices change their speed, and do so at every width: a step tells of those, too, that are not in use.
    """

    def __init__(self, buckets: Sequence[int], seconds: Mapping[int, float] | None = None) -> None:
        """Take increasing buckets, and times where they are known."""
        self.buckets = tuple(buckets)
        self.seconds: dict[int, float] = dict(seconds or {})
        self.beside = {"encode": 0.0, "decode": 0.0}
        """Seconds for which steps wait for an image, before its first one and behind its last one."""
        self.lately = 0.0
        """Seconds of steps of late, however wide."""
        self._runs: dict[int, int] = {}
        self._timed = dict.fromkeys(self.seconds, LEARNT)

    def add(self, bucket: int, seconds: float) -> None:
        """Take note of what a step took."""
        runs = self._runs[bucket] = self._runs.get(bucket, 0) + 1
        if runs <= UNSETTLED:
            return
        timed = self._timed[bucket] = self._timed.get(bucket, 0) + 1
        before = self.seconds.get(bucket, seconds)
        if timed <= LEARNT or not before:
            self.seconds[bucket] = before + (seconds - before) / timed
        else:
            away = min(max(seconds / before, 1 / STALL), STALL) - 1
            self.seconds = {each: (1 + FADING * away) * known for each, known in self.seconds.items()}
            self.seconds[bucket] *= 1 + DRIFT * away
        self.lately += (LATELY if self.lately else 1.0) * (seconds - self.lately)

    def note(self, stage: str, seconds: float) -> None:
        """Take note of what encoding or decoding an image took."""
        before = self.beside[stage] or seconds
        self.beside[stage] = before + FADING * (seconds - before)

    def restart(self) -> None:
        """Expect first runs again: the steps of new buffers."""
        self._runs.clear()

    def set(self, bucket: int, seconds: float) -> None:
        """Take what a step was measured to take."""
        self._runs[bucket], self._timed[bucket] = UNSETTLED, LEARNT
        self.seconds[bucket] = seconds

    def bucket(self, rows: int) -> int:
        """Return the smallest bucket that holds so many rows."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def of(self, rows: int) -> float:
        """Return the seconds of a step of so many rows; a guess where its bucket has no time yet, 0 where none has."""
        bucket = self.bucket(rows)
        if bucket in self.seconds or not self.seconds:
            return self.seconds.get(bucket, 0.0)
        near = min(tuple(self.seconds), key=lambda known: abs(known - bucket))
        return self.seconds[near] * bucket / near

    def knee(self) -> int:
        """Return the fewest rows with good throughput; a wider bucket is tried next while it has no time."""
        return self._fewest(GOOD)

    def most(self, wanted: int) -> int:
        """Return how many rows to use when so many are wanted: up to the knee, or beyond it while much waits."""
        return self._fewest(FULL if wanted >= MUCH * self.buckets[-1] else GOOD)

    def _fewest(self, part: float) -> int:
        """Return the fewest rows with a part of the best throughput, or a wider bucket that has no time yet.

        Of odd numbers only one, and the most there are: a row of another would be of no use to images with guidance.
        """
        wide = [bucket for bucket in self.buckets if bucket % 2 == 0 or bucket in (1, self.buckets[-1])]
        pace = {bucket: bucket / self.seconds[bucket] for bucket in wide if self.seconds.get(bucket)}
        best = max(pace.values(), default=0.0)
        gain = {rows: pace[after] / pace[rows] / STEEP ** math.log2(after / rows) for rows, after in pairwise(pace)}
        fewest = next((rows for rows in pace if pace[rows] >= part * best and gain.get(rows, 0.0) < 1), 0)
        return next((bucket for bucket in wide if bucket > fewest and bucket not in self.seconds), fewest)

    def wait(self, work: float) -> float | None:
        """Return the seconds that rows times evaluations of work take at the knee, None before any step was timed."""
        if not self.seconds:
            return None
        knee = self.knee()
        return work / knee * self.of(knee)
