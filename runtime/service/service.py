"""Requests in, jobs out: limits, the right bundle, its batcher, and pictures encoded beside it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Literal

from ...engines.errors import LatentRTError, QueueFullError, RequestError, reason
from ..batcher import events
from .counts import Figures
from .deadlines import Deadlines, too_late
from .errors import BusyError, UnavailableError, outcome_of
from .job import Job, facts_of
from .models import Model, Models
from .pictures import Picture, encoded
from .store import Store
from .work import Limits, Output, Size, Work, check_timer, size_of

PREVIEW = Output("jpeg", 80)
"""A PNG of a preview would cost ten times the time."""
DRAIN_SECONDS = 5.0
PATIENCE = 5.0
"""Seconds since a job was asked for, in which its client is taken to ask again."""

log = logging.getLogger(__name__)


class Service:
    """What serves: takes `Work`, returns a `Job`, and knows those that are not over. For any number of threads."""

    def __init__(
        self,
        models: Models,
        limits: Limits | None = None,
        *,
        keep_prompts: bool = False,
        results_seconds: float = 600.0,
        results_bytes: int = 1 << 28,
    ) -> None:
        """Take models, of which none needs to be open yet.

        With `keep_prompts` every PNG holds its request, prompt included. Finished jobs that were to be kept are for
        `results_seconds`, in at most `results_bytes` of memory. Raises `RequestError` for those that keep nothing.
        """
        check_timer("results_seconds (--results-ttl)", results_seconds)
        if not results_bytes > 0:
            raise RequestError(f"results_bytes (--results-memory) is {results_bytes}: give more than 0")
        self.models, self.limits, self.keep_prompts = models, limits or Limits(), keep_prompts
        self.store = Store(results_seconds, results_bytes)
        self.state: Literal["loading", "ready", "draining", "failed"] = "loading"
        self._live: dict[str, Job] = {}
        self._lock, self._naming = threading.Lock(), threading.Lock()
        self._deadlines = Deadlines(lambda job, error: self._end(job, self.models.find(job.model), error))
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), "latentrt pictures")
        self.requests = ThreadPoolExecutor(4, "latentrt requests")
        """Threads for who serves requests on an event loop: taking one takes time."""

    def open(self) -> None:
        """Open the first model, and further ones while there is room; raises what opening raises.

        A service that drains or has failed meanwhile opens no more.
        """
        for model in self.models:
            if self.state in ("draining", "failed"):
                return
            taken = self.models.open_bytes
            if self.models.budget is None or not taken or taken + model.nbytes <= self.models.budget:
                self.models.opened(model).result()
        if self.state == "loading":
            self.state = "ready"

    @property
    def unfinished(self) -> list[Job]:
        """The jobs that are not over."""
        with self._lock:
            return list(self._live.values())

    @property
    def replicas(self) -> Iterable[tuple[str, str, Figures]]:
        """Figures of batchers elsewhere: the replica that has them, the model, and what it said last."""
        return ()

    def submit(
        self, work: Work, *, keep: bool = False, name: str | None = None, asked_for: str = "", steps: bool = True
    ) -> Job:
        """Take a request, and return its job; with `keep` it can be found by its id, and by the idempotency key `name`.

        Without `steps` its listeners hear of pictures and of the end alone, which costs less.
        Never waits for a bundle to be opened: until it is, the job is "loading", and what is wrong with the request may
        only then end it. Raises what `Batcher.submit` raises, `RefusedError`, `NotFoundError`, `BusyError` and
        `UnavailableError`.
        """
        if name is None:
            return self._submit(work, keep, None, asked_for, steps)
        with self._naming:  # the same key may come twice at once, and again while nothing more is taken
            before = self.store.named(work.owner, name, asked_for)
            return before or self._submit(work, keep, name, asked_for, steps)

    def _submit(self, work: Work, keep: bool, name: str | None, asked_for: str, steps: bool) -> Job:
        self.check_ready()
        model, size = self.check(work)
        job = Job(work, model.name, size, work.timeout or self.limits.timeout, steps=steps)
        with self._lock:
            self.check_ready()  # a drain that begins now waits for this one, or this one is refused
            most = self.limits.unfinished
            if most is not None and sum(each.work.owner == work.owner for each in self._live.values()) >= most:
                raise BusyError(f"{most} requests of this key are not done: at most so many are taken", "key_busy", 1.0)
            if model.state != "ready":
                self._check_waiting(work, model)
            self._live[job.id] = job
        self.models.hold(model)
        try:
            if model.batcher is not None:
                self._begin(job, model)
        except BaseException:
            self._over(job, model)
            raise
        if keep:
            self.store.add(job, name, asked_for)
        if job.state == "loading":
            job.waits(lambda: self._over(job, model))
            self._deadlines.watch(job)
            self.models.opened(model).add_done_callback(lambda opened: self._opened(job, model, opened))
        elif job.is_over:  # ended by others before it had what tells of that
            self._over(job, model)
        return job

    def check(self, work: Work) -> tuple[Model, Size]:
        """Return a request's model and the size of its pictures; raises what can be said without a batcher."""
        model = self.models.find(work.model)
        size = size_of(work, model.manifest, model.allowed, model.most_pixels)
        self.limits.check(work, model.manifest, size)
        return model, size

    def _check_waiting(self, work: Work, model: Model) -> None:
        """Raise `QueueFullError` when too many images wait for a model to be opened; with the lock held."""
        live, most = self._live.values(), self.models.max_waiting
        waiting = sum(job.work.images for job in live if job.model == model.name and job.state == "loading")
        if waiting and waiting + work.images > most:
            raise QueueFullError(
                f"{waiting} images wait for model {model.name} to be opened: at most {most} may; try later",
                model.load_seconds,
            )

    def check_ready(self) -> None:
        """Raise `UnavailableError` unless requests are taken."""
        if self.state == "loading":
            raise UnavailableError("the server is loading: try later", "loading", DRAIN_SECONDS)
        if self.state == "draining":
            raise UnavailableError("the server is shutting down: try another one, or later", "draining", DRAIN_SECONDS)
        if self.state == "failed":
            raise UnavailableError("the server has failed and restarts: try later", "failed", DRAIN_SECONDS)

    def _opened(self, job: Job, model: Model, opened: Future[None]) -> None:
        """Go on with a job whose model was opened, or could not be; on the loader's thread."""
        try:
            opened.result()
            if job.is_over:
                self._over(job, model)
                return
            # A static backend draws fewer sizes, as is known only now.
            job.size = size_of(job.work, model.manifest, model.allowed, model.most_pixels)
            self._begin(job, model)
        except Exception as error:
            self._end(job, model, error)

    def _begin(self, job: Job, model: Model) -> None:
        """Hand a job to its batcher; raises what `submit` raises."""
        batcher, work = model.batcher, job.work
        assert batcher is not None
        width, height = job.size
        if (left := job.left) <= 0:
            raise too_late(job)
        try:
            future = batcher.submit(
                **{**work.arguments, "width": width, "height": height},
                timeout=left,
                previews=work.previews,
                on_event=(lambda event: self._heard(job, event)) if job.steps or work.images > 1 else None,
            )
        except RequestError as error:
            place = f"bundle {model.bundle.path}"  # which is not for clients
            if place not in str(error):
                raise
            raise RequestError(str(error).replace(place, f"model {model.name}")) from error
        job.started(future)
        future.add_done_callback(lambda done: self._settled(job, model, done))

    def _heard(self, job: Job, event: events.Event) -> None:
        """Pass on what a batcher says of a job; on a thread of the batcher."""
        if isinstance(event, events.Admitted):
            job.admitted()
        elif isinstance(event, events.Stepped):
            job.stepped(event.index, event.done, event.total)
        elif isinstance(event, events.Previewed):
            self._pool.submit(self._preview, job, event.index, event.number - 1, event.picture)
        elif isinstance(event, events.Drawn):
            self._pool.submit(self._picture, job, event.index, event.picture, event.seed)

    def _preview(self, job: Job, index: int, number: int, picture: Any) -> None:
        if not job.is_over:
            output = job.work.output if job.work.output.format != "png" else PREVIEW
            job.previewed(index, number, Picture(encoded(picture, output), output))

    def _picture(self, job: Job, index: int, picture: Any, seed: int, request: Any = None) -> None:
        """Encode a picture, unless it is there or nobody wants it."""
        if job.is_over or index in job.pictures:
            return
        began, output = time.perf_counter(), job.work.output
        said = self._written(job, seed) if self.keep_prompts else None
        data = encoded(picture, output, said)
        job.pictured(index, Picture(data, output, seed, time.perf_counter() - began))

    def _written(self, job: Job, seed: int) -> Mapping[str, Any]:
        """Return what a PNG says of its request."""
        arguments = {name: value for name, value in job.work.arguments.items() if name not in ("image", "mask_image")}
        width, height = job.size
        return {**arguments, "seed": seed, "width": width, "height": height, "bundle": job.model}

    def _settled(self, job: Job, model: Model, done: Future[Any]) -> None:
        """Finish a job whose future is done; on a thread of the batcher."""
        if done.cancelled():
            self._end(job, model, CancelledError())
        elif (error := done.exception()) is not None:
            self._end(job, model, error)
        else:
            self._pool.submit(self._finish, job, model, done.result())

    def _finish(self, job: Job, model: Model, result: Any) -> None:
        try:
            for index, (picture, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                self._picture(job, index, picture, seed)
            facts = facts_of(job, result) | {"bundle": model.digest}
            for warning in result.warnings if self.keep_prompts else ():  # they quote prompts
                log.warning(warning)
        except Exception as error:
            self._end(job, model, error)
            return
        job.end("succeeded", facts=facts)
        self._over(job, model)

    def _end(self, job: Job, model: Model, error: BaseException) -> None:
        outcome = outcome_of(error)
        if outcome in ("failed", "late"):
            known = isinstance(error, LatentRTError)
            extra = {"job": job.id, "request_id": job.work.request_id}
            said = f"{type(error).__name__}: {reason(error)}" if known else type(error).__name__
            log.warning("job %s %s: %s", job.id, outcome, said, extra=extra, exc_info=None if known else error)
        job.end("cancelled" if outcome == "cancelled" else "failed", error)
        self._over(job, model)

    def _over(self, job: Job, model: Model) -> None:
        """Count a job out, once."""
        with self._lock:
            gone = self._live.pop(job.id, None)
        if gone is not None:
            self.models.let_go(model)
        if gone is not None and job.is_over:
            self.store.ended(job)
            self.models.observer.ended(job)

    def drain(self, timeout: float) -> bool:
        """Take nothing more, wait for what there is, cancel what is left then, and tell whether nothing was.

        Results of jobs whose clients keep asking for them are waited for as well, until they were fetched.
        """
        with self._lock:
            self.state = "failed" if self.state == "failed" else "draining"
        end = time.monotonic() + timeout
        for job in self.unfinished:
            job.wait(max(0.0, end - time.monotonic()))
        left = [job for job in self.unfinished if not job.is_over]
        while not left and self.store.is_wanted(PATIENCE) and time.monotonic() < end:
            time.sleep(0.05)
        for job in left:
            job.end("failed", UnavailableError("the server shut down before this was done", "draining", DRAIN_SECONDS))
        return not left

    def fail(self, error: BaseException) -> None:
        """Take nothing more, and end every job with an error: the device is lost."""
        self.state = "failed"
        for job in self.unfinished:
            job.end("failed", error)

    def close(self) -> None:
        """Cancel what is left and close the models."""
        for job in self.unfinished:
            job.cancel()
        self.models.close(cancel=True)
        self._pool.shutdown(wait=True)
        self.requests.shutdown(wait=False, cancel_futures=True)
