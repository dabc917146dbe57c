"""The batcher: requests in, futures out, one thread that lets their images share every step."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engines.bundle import Bundle
from ...engines.errors import EngineError, QueueFullError, RequestError
from ..loop.shared import Key
from ..pipeline import Pipeline
from ..result import GenerationResult
from .encode import Encoder
from .finish import Finisher
from .job import Job
from .pool import Pool
from .prepared import Fit, table_names

BUCKETS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MAX_ROWS = 1024
MAX_POOLS = 4
"""Sizes of images that have buffers at one time."""
TURNS_IN_A_ROW, PAUSE = 8, 1e-4
"""Steps after which others may have the pipeline, and the seconds in which they can take it: locks are not fair."""


class Batcher:
    """Draws unlike requests together: prompts, samplers, steps, guidance and seeds may all differ.

    A context manager, for any number of threads. `slots` images are in flight at a time on `rows` network rows, two for
    an image with guidance and one without (default: two for each slot); `max_waiting` images of a size may wait. The
    rows that are computed are the fewest that hold what is in flight, of a few numbers; with `fixed_rows` it is always
    all of them, and a picture is then the same bit for bit whatever else is drawn.
    """

    def __init__(
        self,
        pipe: Pipeline | Bundle | str | Path,
        *,
        slots: int = 4,
        rows: int | None = None,
        fixed_rows: bool = False,
        max_waiting: int = 64,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        """Start the batcher on an open pipeline, which stays the caller's, or on a bundle.

        `backend` and `options` are those of `Pipeline.open`, for a bundle. Raises `RequestError` for numbers out of
        range, `BundleError` for a bundle whose steps are not of one image alone, and what `Pipeline.open` raises.
        """
        rows = 2 * slots if rows is None else rows
        for name, value, least, most in (
            ("slots", slots, 1, MAX_ROWS // 2),
            ("rows", rows, max(2, slots), MAX_ROWS),
            ("max_waiting", max_waiting, 1, 2**31),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise RequestError(f"{name} is {value!r}: give a whole number from {least} to {most}")
        self._owns = not isinstance(pipe, Pipeline)
        self.pipe = pipe if isinstance(pipe, Pipeline) else Pipeline.open(pipe, backend, **options)
        self._slots, self._max_waiting = slots, max_waiting
        session = self.pipe.session
        try:
            if session.low_memory:
                raise RequestError(
                    "the pipeline was opened with low_memory: a batcher needs all engines, open it without"
                )
            table_names(self.pipe.bundle)
        except BaseException:
            self._close_pipe()
            raise
        narrower: Sequence[int] = () if fixed_rows or not self.pipe.backend.dynamic else BUCKETS
        self._buckets = (*(bucket for bucket in narrower if bucket < rows), rows)
        self._changed = threading.Condition()
        self._pools: OrderedDict[Fit, Pool] = OrderedDict()  # the one whose turn was longest ago first
        self._leaving: list[Pool] = []
        self._jobs: dict[int, Job] = {}
        self._closing, self._process = False, os.getpid()
        self._uses: set[Key] = set()
        open_engine = session.hold(self._uses)
        self._encoder = Encoder(self.pipe.backend.device, self.pipe.bundle, open_engine, session.stream)
        self._finisher = Finisher()
        self._thread = threading.Thread(target=self._run, name="latentrt batcher", daemon=True)
        self._thread.start()
        atexit.register(self.close, cancel=True)  # engines must not run on while the interpreter goes

    def submit(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        **arguments: Any,
    ) -> Future[GenerationResult[Any]]:
        """Queue a request with the arguments of a pipeline's call, and return the future of its result.

        Every image goes by itself, so the images of one request may be drawn with those of others. `future.cancel()`
        works until the result is there, also while images are drawn, and frees their slots after the step that runs. A
        request that is not done `timeout` seconds from now fails with `DeadlineError`.

        Raises `RequestError` for what cannot be served as given, `QueueFullError` when too much waits, and
        `EngineError` when the batcher is closed.
        """
        if timeout is not None and not timeout > 0:
            raise RequestError(f"timeout is {timeout!r}: give seconds, more than 0, or leave it out")
        self._check_open()
        job = Job.of(self.pipe, {"prompt": prompt, "negative_prompt": negative_prompt, **arguments}, timeout)
        if (least := job.images[0].candidate.rows) > self._buckets[-1]:
            raise RequestError(f"an image of this request needs {least} rows: open the batcher with more")
        if len(job.images) > self._max_waiting:
            raise RequestError(
                f"the request has {len(job.images)} images: at most max_waiting={self._max_waiting} wait"
            )
        with self._changed:
            self._check_open()
            pool = self._pool(job.fit)
            if len(pool.waiting) + len(job.images) > self._max_waiting:
                seconds = pool.times.wait(self._work(pool))
                after = "" if seconds is None else f", and take about {seconds:.1f} s"
                raise QueueFullError(
                    f"{len(pool.waiting)} images of this size wait{after}: at most {self._max_waiting} may; try later",
                    seconds,
                )
            pool.waiting += job.images
            pool.live += len(job.images)
            self._jobs[id(job)] = job
            self._changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Images that are in no slot yet."""
        with self._changed:
            return sum(len(pool.waiting) for pool in self._pools.values())

    @property
    def running(self) -> int:
        """Images in flight."""
        with self._changed:
            return sum(pool.live - len(pool.waiting) for pool in self._pools.values())

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineError("the batcher was opened in another process, of which this is a fork: open one here")
        if self._closing:
            raise EngineError("the batcher is closed: open another one")

    def _work(self, pool: Pool) -> float:
        return sum(job.work for job in self._jobs.values() if job.fit == pool.fit)

    def _pool(self, fit: Fit) -> Pool:
        """Return the pool of a fit; one that has nothing to do makes room for a new one."""
        if fit not in self._pools:
            if len(self._pools) >= MAX_POOLS:
                idle = next((pool for pool in self._pools.values() if not pool.live), None)
                if idle is None:
                    raise QueueFullError(
                        f"images of {MAX_POOLS} other sizes are being drawn: at most so many; try later"
                    )
                self._leaving.append(self._pools.pop(idle.fit))
            pipe, size = self.pipe, (self._slots, self._buckets)
            self._pools[fit] = Pool(pipe.session, self._encoder, fit, *size, pipe.mode, self._changed, self._settle)
        return self._pools[fit]

    def _settle(self, job: Job) -> None:
        with self._changed:
            del self._jobs[id(job)]
        self._finisher.hand_over(job)

    def _run(self) -> None:
        """Give every size its turn until the batcher is closed and nothing is left."""
        for turn in itertools.count(1):
            if (pool := self._next()) is None:
                return
            if turn % TURNS_IN_A_ROW == 0:
                time.sleep(PAUSE)
            try:
                with self.pipe.session.request():
                    while self._leaving:
                        self._leaving.pop().close()
                    pool.turn()
            except Exception as error:  # the pipeline was closed, or its device is lost
                pool.fail(error, waiting=True)

    def _next(self) -> Pool | None:
        with self._changed:
            while True:
                busy = next((pool for pool in self._pools.values() if pool.live), None)
                if busy is not None:
                    self._pools.move_to_end(busy.fit)
                    return busy
                if self._closing:
                    return None
                self._changed.wait()

    def close(self, *, cancel: bool = False) -> None:
        """Draw what was submitted, or with `cancel` drop it, and free everything; calling it again does nothing.

        Raises `RequestError` when a callback of a future calls it, which runs on a thread of the batcher.
        """
        if threading.current_thread() in (self._thread, self._finisher.thread):
            raise RequestError("a callback of a future closed its batcher: close it from another thread")
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            jobs = list(self._jobs.values()) if cancel else []
            self._changed.notify()
        for job in jobs:
            job.future.cancel()
        self._thread.join()
        with self._changed:
            finisher, pools = self._finisher, [*self._leaving, *self._pools.values()]
            self._leaving, self._pools = [], OrderedDict()
        finisher.close()
        with self.pipe.backend.lock:
            for pool in pools:
                pool.close()
            self._encoder.close()
            self.pipe.session.let_go(self._uses)
        self._close_pipe()
        atexit.unregister(self.close)

    def _close_pipe(self) -> None:
        if self._owns:
            self.pipe.close()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(cancel=error is not None)
