"""Requests that are late before a batcher has them: while their bundle is opened, or an engine elsewhere is found."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ...engines.errors import DeadlineError
from .job import Job

LOOK_SECONDS = 0.1
"""How often it is looked whether a job is late."""


class Deadlines:
    """Looks after jobs that are loading, on a thread that ends with the last of them."""

    def __init__(self, end: Callable[[Job, DeadlineError], None]) -> None:
        """Have `end` called with a job that is late."""
        self._end = end
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    def watch(self, job: Job) -> None:
        """Look after a job until it has a batcher, or is over."""
        with self._lock:
            self._jobs.append(job)
            if len(self._jobs) == 1:
                threading.Thread(target=self._run, name="latentrt deadlines", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._jobs = jobs = [job for job in self._jobs if job.state == "loading"]
            if not jobs:
                return
            for job in jobs:
                if job.left <= 0:
                    self._end(job, too_late(job))
            time.sleep(LOOK_SECONDS)


def too_late(job: Job) -> DeadlineError:
    """Return what ends a job that has no time left."""
    return DeadlineError(
        f"the result was not there in time, {job.timeout:g} s after its request: what draws it was not open yet; "
        "give more timeout, or try later"
    )
