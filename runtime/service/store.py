"""Finished jobs that somebody may still ask for, bounded in time and bytes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from .errors import NotFoundError, RefusedError
from .job import Job

MAX_JOBS = 10_000
SWEEP_SECONDS = 0.5


class Store:
    """Jobs by id, each its owner's alone; results go after `ttl` seconds, and the oldest first beyond `max_bytes`."""

    def __init__(self, ttl: float, max_bytes: int) -> None:
        """Keep nothing yet."""
        self.ttl, self.max_bytes = ttl, max_bytes
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._named: dict[tuple[str, str], tuple[str, str]] = {}  # owner, idempotency key: job, what was asked for
        self._name_of: dict[str, tuple[str, str]] = {}
        self._lock, self._swept = threading.Lock(), 0.0

    def add(self, job: Job, name: str | None = None, asked_for: str = "") -> None:
        """Keep a job, under an idempotency key of its owner if there is one."""
        with self._lock:
            self._jobs[job.id] = job
            if name is not None:
                owned = (job.work.owner, name)
                self._named[owned], self._name_of[job.id] = (job.id, asked_for), owned
            self._sweep()

    def named(self, owner: str, name: str, asked_for: str) -> Job | None:
        """Return the job of an idempotency key; raises `RefusedError` when something else was asked for with it."""
        with self._lock:
            self._look()
            found, before = self._named.get((owner, name), (None, ""))
            if found is None or self._is_late(self._jobs[found]):
                return None
            if before != asked_for:
                raise RefusedError(
                    "Idempotency-Key was used for another request: give each request a key of its own",
                    "Idempotency-Key",
                    "idempotency_key_reused",
                )
            return self._jobs[found]

    def find(self, owner: str, id: str) -> Job:
        """Return a job of an owner; raises `NotFoundError`."""
        with self._lock:
            self._look()
            job = self._jobs.get(id)
            if job is not None and self._is_late(job):
                job = None
        if job is None or job.work.owner != owner:
            raise NotFoundError(
                f"there is no job {id[:60]!r}: it is another key's, or its result was dropped", "id", "job_not_found"
            )
        job.asked = time.monotonic()
        return job

    def of(self, owner: str) -> list[Job]:
        """Return the jobs of an owner, the newest first."""
        with self._lock:
            self._look()
            jobs = [job for job in reversed(self._jobs.values()) if job.work.owner == owner]
            return [job for job in jobs if not self._is_late(job)]

    def all(self) -> list[Job]:
        """Return all jobs."""
        with self._lock:
            return list(self._jobs.values())

    def drop(self, job: Job) -> None:
        """Forget a job."""
        with self._lock:
            self._drop(job.id)

    def sweep(self) -> int:
        """Drop what has expired, and return the bytes of what is left."""
        with self._lock:
            return self._sweep()

    def _is_late(self, job: Job) -> bool:
        return job.finished is not None and job.finished < time.time() - self.ttl

    def _look(self) -> None:
        """Sweep, if that was not done a moment ago: clients ask often, and there may be many jobs."""
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._sweep()

    def _sweep(self) -> int:
        self._swept = time.monotonic()
        over = [job for job in self._jobs.values() if job.finished is not None]
        for job in over:
            if self._is_late(job):
                self._drop(job.id)
        left = [job for job in over if job.id in self._jobs]
        sizes = {job.id: job.nbytes for job in left}
        total, count = sum(sizes.values()), len(self._jobs)
        for job in sorted(left, key=lambda job: job.finished or 0.0):
            if total <= self.max_bytes and count <= MAX_JOBS:
                break
            total, count = total - sizes[job.id], count - 1
            self._drop(job.id)
        return total

    def _drop(self, id: str) -> None:
        self._jobs.pop(id, None)
        owned = self._name_of.pop(id, None)
        if owned is not None and self._named[owned][0] == id:  # else a newer job has the name
            del self._named[owned]
