"""Jobs that somebody may still ask for, and their results, bounded in time and bytes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from .errors import NotFoundError, RefusedError
from .job import Job

MAX_JOBS = 10_000


class Store:
    """Jobs by id, each its owner's alone; results go after `ttl` seconds, and the oldest first beyond `max_bytes`."""

    def __init__(self, ttl: float, max_bytes: int) -> None:
        """Keep nothing yet."""
        self.ttl, self.max_bytes = ttl, max_bytes
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._over: OrderedDict[str, tuple[float, int]] = OrderedDict()  # id: when it was over, bytes; oldest first
        self._bytes = 0
        self._named: dict[tuple[str, str], tuple[str, str]] = {}  # owner, idempotency key: job, what was asked for
        self._name_of: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, job: Job, name: str | None = None, asked_for: str = "") -> None:
        """Keep a job, under an idempotency key of its owner if there is one."""
        with self._lock:
            self._jobs[job.id] = job
            if name is not None:
                owned = (job.work.owner, name)
                self._named[owned], self._name_of[job.id] = (job.id, asked_for), owned
            if job.is_over:  # before it was kept
                self._note(job)
            self._sweep()

    def ended(self, job: Job) -> None:
        """Note the end of a job, from which on its result is kept for so long; one that is not kept is none of ours."""
        with self._lock:
            if job.id in self._jobs:
                self._note(job)
                self._sweep()

    def named(self, owner: str, name: str, asked_for: str) -> Job | None:
        """Return the job of an idempotency key; raises `RefusedError` when something else was asked for with it."""
        with self._lock:
            self._sweep()
            found, before = self._named.get((owner, name), (None, ""))
            if found is None:
                return None
            if before != asked_for:
                raise RefusedError(
                    "Idempotency-Key was used for another request: give each request a key of its own",
                    "Idempotency-Key",
                    "idempotency_key_reused",
                )
            job = self._jobs[found]
        job.asked = time.monotonic()
        return job

    def has(self, owner: str, name: str) -> bool:
        """Tell whether an owner has a job of an idempotency key."""
        with self._lock:
            return (owner, name) in self._named

    def find(self, owner: str, id: str) -> Job:
        """Return a job of an owner; raises `NotFoundError`."""
        with self._lock:
            self._sweep()
            job = self._jobs.get(id)
        if job is None or job.work.owner != owner:
            raise NotFoundError(
                f"there is no job {id[:60]!r}: it is another key's, or its result was dropped", "id", "job_not_found"
            )
        job.asked = time.monotonic()
        return job

    def of(self, owner: str) -> list[Job]:
        """Return the jobs of an owner, the newest first."""
        with self._lock:
            self._sweep()
            return [job for job in reversed(self._jobs.values()) if job.work.owner == owner]

    def is_wanted(self, patience: float) -> bool:
        """Tell whether there is a result that was not fetched, and was asked for within so many seconds."""
        since = time.monotonic() - patience
        with self._lock:
            return any(job.is_over and not job.fetched and job.asked > since for job in self._jobs.values())

    def drop(self, job: Job) -> None:
        """Forget a job."""
        with self._lock:
            self._drop(job.id)

    def sweep(self) -> int:
        """Drop what has expired, and return the bytes of what is left."""
        with self._lock:
            self._sweep()
            return self._bytes

    def _note(self, job: Job) -> None:
        if job.id not in self._over:
            self._over[job.id] = (time.monotonic(), job.nbytes)
            self._bytes += job.nbytes

    def _sweep(self) -> None:
        late = time.monotonic() - self.ttl
        while self._over:
            id, (ended, _) = next(iter(self._over.items()))
            if ended > late and self._bytes <= self.max_bytes and len(self._jobs) <= MAX_JOBS:
                return
            self._drop(id)

    def _drop(self, id: str) -> None:
        self._jobs.pop(id, None)
        self._bytes -= self._over.pop(id, (0.0, 0))[1]
        owned = self._name_of.pop(id, None)
        if owned is not None and self._named[owned][0] == id:
            del self._named[owned]
