"""Requests that were taken, and their sizes: who has room, whose turn it is, and how long what is left takes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ...engines.errors import DeadlineError, QueueFullError, RequestError
from .events import JobProgress, State
from .flight import Shared
from .job import Image, Job
from .policy import due, outlook, shared, until_done
from .pool import Pool
from .prepared import Fit
from .stats import SizeStats, Stats

MAX_POOLS = 4
"""Sizes of images that have buffers at one time, beside those that were warmed up."""

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Whose turn it is among sizes: that of which the device has done least while it had something to do."""

    def __init__(self) -> None:
        """Nobody has had anything."""
        self._spent: dict[Key, float] = {}
        self._busy: set[Key] = set()

    def next(self, busy: Sequence[Key]) -> Key:
        """Return whose turn it is of those that have something to do; who comes back has no claim for its absence."""
        here, before = [self._spent[key] for key in busy if key in self._busy], self._busy
        least = min(here, default=max(self._spent.values(), default=0.0))
        for key in busy:
            if key not in before:
                self._spent[key] = max(least, self._spent.get(key, least))
        self._busy = set(busy)
        return min(busy, key=lambda key: (self._spent[key], key in before))

    def spend(self, key: Key, seconds: float) -> None:
        """Take note of the time that a turn took."""
        if key in self._spent:
            self._spent[key] += seconds

    def forget(self, key: Key) -> None:
        """Drop a size."""
        self._spent.pop(key, None)
        self._busy.discard(key)


@dataclass
class Queue:
    """All methods are called with the lock held."""

    shared: Shared
    max_waiting: int
    """Images of a size that may wait for their first slot."""
    max_wait: float | None
    """Seconds of steps that what waits may take."""
    pools: OrderedDict[Fit, Pool] = field(default_factory=OrderedDict)
    """The one whose turn was longest ago first."""
    leaving: list[Pool] = field(default_factory=list)
    """Pools whose buffers are to be freed."""
    jobs: dict[int, Job] = field(default_factory=dict)
    warm: set[Fit] = field(default_factory=set)
    """Sizes that were warmed up: they stay."""
    turns: Turns[Fit] = field(default_factory=Turns)

    def add(self, job: Job) -> None:
        """Take a request; raises as `check` does."""
        self.check(job)
        pool = self.pool(job.fit)
        pool.waiting += job.images
        pool.known |= job.needs
        self.jobs[id(job)] = job

    def check(self, job: Job) -> None:
        """Raise for a request that has no room, would wait too long, or has no engines."""
        if (least := job.images[0].candidate.held) > self.shared.buckets[-1]:
            raise RequestError(f"an image of this request needs {least} rows: open the batcher with more")
        if len(job.images) > self.max_waiting:
            raise RequestError(f"the request has {len(job.images)} images: at most max_waiting={self.max_waiting} wait")
        pool = self.pools.get(job.fit)
        waiting = 0 if pool is None else sum(not image.admitted for image in pool.waiting)
        if pool is not None and (excess := waiting + len(job.images) - self.max_waiting) > 0:
            seconds = self.until_room(pool, excess)
            after = "" if seconds is None else f", and there is room in about {seconds:.1f} s"
            raise QueueFullError(
                f"{waiting} images of this size wait{after}: at most {self.max_waiting} may; try later", seconds
            )
        if self.max_wait is not None and (wait := self.waiting_seconds()) > self.max_wait:
            raise QueueFullError(
                f"what waits takes about {wait:.1f} s: at most {self.max_wait:g} s may; try later", wait - self.max_wait
            )
        needed = None if job.due is None else self.estimate(job)
        if job.due is not None and needed is not None and needed > (left := job.due - time.monotonic()):
            raise DeadlineError(
                f"the request takes about {needed:.1f} s from now, with what comes before it, and has "
                f"{max(left, 0):.1f} s: give more timeout, or try later",
                needed,
            )

    def pool(self, fit: Fit) -> Pool:
        """Return the pool of a fit; one that has nothing to do makes room for a new one."""
        if fit not in self.pools:
            others = [pool for each, pool in self.pools.items() if each not in self.warm]
            if len(others) >= MAX_POOLS:
                idle = next((pool for pool in others if not pool.live), None)
                if idle is None:
                    raise QueueFullError(
                        f"images of {MAX_POOLS} other sizes are being drawn: at most so many; try later"
                    )
                self.leaving.append(self.pools.pop(idle.fit))
                self.turns.forget(idle.fit)
            self.pools[fit] = Pool(self.shared, fit)
        return self.pools[fit]

    def next(self) -> Pool | None:
        """Return the pool whose turn it is, None when there is nothing to do."""
        busy = [fit for fit, pool in self.pools.items() if pool.live]
        if not busy:
            return None
        fit = self.turns.next(busy)
        self.pools.move_to_end(fit)
        return self.pools[fit]

    def work(self, pool: Pool) -> float:
        """Return the work that is left of a size, rows times evaluations."""
        return sum(job.work for job in self.jobs.values() if job.fit == pool.fit)

    def waiting_seconds(self) -> float:
        """Return the seconds of steps that what waits takes."""
        busy = [pool for pool in self.pools.values() if pool.waiting]
        return sum(pool.times.wait(sum(image.now.work for image in pool.waiting)) or 0.0 for pool in busy)

    def elsewhere(self, pool: Pool) -> list[float]:
        """Return the seconds of work of each other size."""
        return [each.times.wait(self.work(each)) or 0.0 for each in self.pools.values() if each is not pool]

    def images(self, pool: Pool) -> Iterator[Image]:
        """Yield the images of a size that are not drawn."""
        for job in self.jobs.values():
            if job.fit == pool.fit and not job.over:
                yield from (image for image in job.images if image.now.left > 0)

    def until_room(self, pool: Pool, excess: int) -> float | None:
        """Return the seconds until so many images of a size have got their first slot, None where nothing was timed."""
        if not pool.times.seconds:
            return None
        images = list(self.images(pool))
        begins, _ = outlook([image.now for image in images], pool.times, self.shared.slots)
        waits = sorted(begin for image, begin in zip(images, begins, strict=True) if not image.admitted)
        return shared(waits[min(excess, len(waits)) - 1] if waits else 0.0, self.elsewhere(pool))

    def estimate(self, job: Job) -> float | None:
        """Return about how many seconds it takes until a request is done, which is there or comes now."""
        pool = self.pools.get(job.fit)
        if pool is None:
            return None
        own = [image.now for image in job.images if image.index not in job.finished_images]
        others = [image.now for image in self.images(pool) if image.job is not job]
        return until_done(own, others, self.elsewhere(pool), pool.times, self.shared.slots)

    def progress(self, job: Job) -> JobProgress:
        """Return how far a request has come."""
        images = job.images  # read before `ended`, which is written before they are dropped
        if job.ended is not None:
            return job.ended
        future, pool = job.future, self.pools.get(job.fit)
        position: int | None = None
        seconds: float | None = 0.0
        state: State = "queued" if job.began is None else "running"
        if future.cancelled():
            state = "cancelled"
        elif future.done():
            state = "done" if job.error is None else "failed"
        elif not job.over:
            queue = [] if pool is None else sorted(pool.waiting, key=lambda image: due(image.candidate, pool.times))
            position = next((place for place, image in enumerate(queue) if image.job is job), None)
            seconds = self.estimate(job)
        done = sum(image.done for image in images)
        total = sum(image.candidate.evaluations for image in images)
        return JobProgress(state, done, total, len(job.finished_images), len(images), position, seconds)

    def stats(self) -> Stats:
        """Return what there is at this moment, and what has been since the batcher was opened."""
        pools, now = list(self.pools.values()), time.monotonic()
        sizes = tuple(
            SizeStats(
                *self.size(pool.fit),
                waiting=len(pool.waiting),
                running=pool.live - len(pool.waiting),
                seconds=pool.times.wait(self.work(pool)),
                curve=dict(pool.times.seconds),
            )
            for pool in pools
        )
        most = max(pools, key=lambda pool: pool.steps, default=None)
        arrivals = [image.candidate.arrived for pool in pools for image in pool.waiting]
        return Stats(
            waiting=sum(size.waiting for size in sizes),
            running=sum(size.running for size in sizes),
            oldest_waiting_seconds=now - min(arrivals, default=now),
            slots=self.shared.slots,
            rows=self.shared.buckets[-1],
            work_seconds=sum(size.seconds or 0.0 for size in sizes),
            curve={} if most is None else dict(most.times.seconds),
            sizes=sizes,
            **self.shared.tally.snapshot(),
        )

    def sizes(self) -> list[str]:
        """Return the sizes that have buffers or work, as users write them."""
        return sorted({f"{width}x{height}" for width, height in map(self.size, self.pools)})

    def size(self, fit: Fit) -> tuple[int, int]:
        """Return width and height of the images of a fit, in pixels."""
        downscale = self.shared.session.bundle.manifest.latent.downscale
        return fit.latents[2] * downscale, fit.latents[1] * downscale
