"""The batcher: requests in, futures out, one thread that lets their images share every step."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engines.bundle import Bundle
from ...engines.errors import EngineError, LatentRTError, RequestError
from ...engines.progress import Progress, silent
from ..loop.widths import SLOTS, buckets_of, check_numbers
from ..pipeline import Pipeline
from ..sizes import checked_sizes
from .deliver import Deliverer
from .events import BatchFuture, JobProgress, Listener
from .finish import settle
from .flight import Shared
from .job import Job
from .pool import Pool
from .prepared import table_names
from .queue import Queue
from .stats import Observer, Stats, Tally
from .warm_up import check_engines, jobs_for, warm_up

TURNS_IN_A_ROW, PAUSE = 8, 1e-4
"""Steps after which others may have the pipeline, and the seconds in which they can take it: locks are not fair."""
AT_EXIT = 1.0
"""Seconds for which the end of the interpreter waits for each listener."""


class Batcher:
    """Draws unlike requests together: prompts, samplers, steps, guidance and seeds may all differ.

    A context manager, for any number of threads. `slots` images are in flight at a time on `rows` network rows, two for
    an image with guidance and one without (default: two for each slot up to 8, and one for each of more slots);
    `max_waiting` images of a size may wait, and no more once what waits takes `max_wait` seconds. The rows that are
    computed are the fewest that hold what is in flight, of a few numbers; with `fixed_rows` it is always all of them,
    and a picture is then the same bit for bit whatever else is drawn.
    """

    def __init__(
        self,
        pipe: Pipeline | Bundle | str | Path,
        *,
        slots: int = SLOTS,
        rows: int | None = None,
        fixed_rows: bool = False,
        max_waiting: int = 64,
        max_wait: float | None = None,
        build: bool = True,
        observer: Observer | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        """Start the batcher on an open pipeline, which stays the caller's, or on a bundle.

        Without `build`, a request of a size whose engines are not there is refused instead of building them.
        `observer` is told of steps, images and requests. `backend` and `options` are those of `Pipeline.open`, for a
        bundle. Raises `RequestError` for numbers out of range, `BundleError` for a bundle whose steps are not of one
        image alone, and what `Pipeline.open` raises.
        """
        rows = check_numbers(slots, rows, max_waiting, max_wait)
        self._owns = not isinstance(pipe, Pipeline)
        self.pipe = pipe if isinstance(pipe, Pipeline) else Pipeline.open(pipe, backend, **options)
        session = self.pipe.session
        try:
            if session.low_memory:
                raise RequestError(
                    "the pipeline was opened with low_memory: a batcher needs all engines, open it without"
                )
            table_names(self.pipe.bundle)
            buckets = buckets_of(rows, dynamic=self.pipe.backend.dynamic, fixed_rows=fixed_rows)
            self._changed = threading.Condition()
            self._closing, self._process, self._build = False, os.getpid(), build
            self._turn_began: float | None = None
            self._deliverer, self._tally = Deliverer(), Tally(observer or Observer())
            shared = (session, self.pipe.mode, slots, buckets, self._changed, self._deliverer, self._tally)
            self._queue = Queue(Shared(*shared, self._settle), max_waiting, max_wait)
            self._thread = threading.Thread(target=self._run, name="latentrt batcher", daemon=True)
            self._thread.start()
        except BaseException:
            self._close_pipe()
            raise
        atexit.register(self._at_exit)  # engines must not run on while the interpreter goes

    def submit(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        previews: int = 0,
        on_event: Listener | None = None,
        **arguments: Any,
    ) -> BatchFuture:
        """Queue a request with the arguments of a pipeline's call, and return the future of its result.

        Every image goes by itself, so the images of one request may be drawn with those of others. `future.cancel()`
        works until the result is there, also while images are drawn, and frees their slots after the step that runs. A
        request that is not done `timeout` seconds from now fails with `DeadlineError`; one that cannot be done by then
        is refused with it at once. `on_event` is called with what happens to the request (see `events`), on a thread
        beside the loop; `previews` pictures of each image are among it, 3 at most.

        Raises `RequestError` for what cannot be served as given, `QueueFullError` when too much waits, and
        `EngineError` when the batcher is closed.
        """
        try:
            self._check_open()
            given = {"prompt": prompt, "negative_prompt": negative_prompt, **arguments}
            job = self._job(given, timeout=timeout, previews=previews, listener=on_event)
            self._check_engines(job)
            with self._changed:  # before it is prepared, which takes time, and again when it is
                self._queue.check(job)
            job.prepare_early()
            with self._changed:
                self._check_open()
                self._queue.add(job)
                self._tally.count("submitted")
                self._changed.notify()
        except LatentRTError as error:
            self._tally.count("rejected", error)
            raise
        return job.future

    def _job(self, given: Mapping[str, Any], **options: Any) -> Job:
        return Job.of(self.pipe, given, progress=self._progress, **options)

    def _progress(self, job: Job) -> JobProgress:
        self._check_process()
        with self._changed:
            return self._queue.progress(job)

    @property
    def waiting(self) -> int:
        """Images that are in no slot."""
        with self._changed:
            return sum(len(pool.waiting) for pool in self._queue.pools.values())

    @property
    def running(self) -> int:
        """Images in flight."""
        with self._changed:
            return sum(pool.live - len(pool.waiting) for pool in self._queue.pools.values())

    @property
    def stuck_seconds(self) -> float:
        """How long the present turn of the loop has run, a step and what comes and goes beside it; 0 when idle."""
        began = self._turn_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def failures_in_a_row(self) -> int:
        """Turns of the loop that have failed since a step worked."""
        return self._tally.failures_in_a_row

    def stats(self) -> Stats:
        """Return what there is at this moment, and what has been since the batcher was opened."""
        self._check_process()
        with self._changed:
            return self._queue.stats()

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        pictures: bool = True,
        progress: Progress = silent,
        **arguments: Any,
    ) -> None:
        """Do what first requests of sizes (width, height) would wait for: build, open, bind, capture; and time steps.

        Every number of rows is run and timed, so that from the first request on it is known what a step takes. With
        `pictures`, also what encodes initial pictures and shows previews. `arguments` are those of requests that need
        other engines. Raises as a request does.
        """
        rows = self._queue.shared.buckets[-1]
        for size in checked_sizes(sizes, self.pipe.bundle.manifest.latent):
            for job in jobs_for(self._job, self.pipe, size, rows, arguments):
                with self.pipe.session.request():
                    self._warm_up(job, pictures, progress)

    def _warm_up(self, job: Job, pictures: bool, progress: Progress) -> None:
        with self._changed:
            self._check_open()
            pool, before = self._queue.pool(job.fit), job.fit in self._queue.warm
            self._queue.warm.add(job.fit)  # so that nothing takes its place meanwhile
        try:
            opened = warm_up(pool, job, pictures, progress)
        except BaseException:
            with self._changed:
                self._queue.warm -= set() if before else {job.fit}
            raise
        with self._changed:
            pool.known |= opened

    def _check_engines(self, job: Job) -> None:
        """Raise `RequestError` for a request whose engines are not there, where none may be built for it."""
        with self._changed:
            pool = self._queue.pools.get(job.fit)
            known = pool is not None and job.needs <= pool.known
            if self._build or self.pipe.backend.dynamic or known:
                return
            sizes = self._queue.sizes()
        check_engines(job, self._queue.shared, sizes)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineError("the batcher was opened in another process, of which this is a fork: open one here")

    def _check_open(self) -> None:
        self._check_process()
        if self._closing:
            raise EngineError("the batcher is closed: open another one")

    def _settle(self, job: Job) -> None:
        with self._changed:
            del self._queue.jobs[id(job)]
        self._deliverer.post(job.box, "end", partial(settle, job, self._tally))

    def _run(self) -> None:
        """Give every size its turn until the batcher is closed and nothing is left."""
        for turn in itertools.count(1):
            if (pool := self._next()) is None:
                return
            if turn % TURNS_IN_A_ROW == 0:
                time.sleep(PAUSE)
            try:
                with self.pipe.session.request():
                    self._turn_began = began = time.monotonic()
                    while self._queue.leaving:
                        self._queue.leaving.pop().close()
                    pool.turn()
                    with self._changed:
                        self._queue.turns.spend(pool.fit, time.monotonic() - began)
            except Exception as error:  # the pipeline was closed, or its device is lost
                pool.fail(error, waiting=True)
            self._turn_began = None

    def _next(self) -> Pool | None:
        with self._changed:
            while True:
                again = self._deliverer.retry()
                if (pool := self._queue.next()) is not None or self._closing:
                    return pool
                self._changed.wait(again)

    def close(self, *, cancel: bool = False) -> None:
        """Draw what was submitted, or with `cancel` drop it, and free everything; calling it again does nothing.

        Waits for listeners and callbacks. Raises `RequestError` when one of them calls it, on a thread of the batcher.
        """
        self._close(cancel, None)

    def _at_exit(self) -> None:
        self._close(True, AT_EXIT)

    def _close(self, cancel: bool, patience: float | None) -> None:
        this = threading.current_thread()
        if this is self._thread or self._deliverer.owns(this):
            raise RequestError("a callback of a future closed its batcher: close it from another thread")
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            jobs = list(self._queue.jobs.values()) if cancel else []
            self._changed.notify()
        for job in jobs:
            job.future.cancel()
        self._thread.join()
        with self._changed:
            pools = [*self._queue.leaving, *self._queue.pools.values()]
            self._queue.leaving.clear()
            self._queue.pools.clear()
        self._deliverer.close(patience)
        with ExitStack() as closing:  # each is closed, whatever another one raises: of a device that is lost
            closing.callback(atexit.unregister, self._at_exit)
            closing.callback(self._close_pipe)
            closing.enter_context(self.pipe.backend.lock)
            for pool in pools:
                closing.callback(pool.close)

    def _close_pipe(self) -> None:
        if self._owns:
            self.pipe.close()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(cancel=error is not None)
