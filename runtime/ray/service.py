"""The ingress's side: a service whose batchers are elsewhere."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...engines.errors import DeadlineError, LatentRTError, QueueFullError
from ..batcher import JobProgress
from ..service import Ended, Event, Job, Limits, Model, Models, Pictured, Previewed, Service, Work
from ..service.counts import Figures
from ..service.errors import UnavailableError
from .wire import Done, Failed, Message, Progress, Taken, Told

TRIES = 2
"""How often a request is drawn that its replica's end has cut short."""
RETRY_SECONDS = 5.0
"""When a client is to try again that was told of a lost replica."""
BUSY_SECONDS = 0.5
"""After which it is tried again to place a request that was taken once, or refused by a replica that has failed."""
CLOSE_SECONDS = 5.0
SILENT_SECONDS = 10.0
"""After which a replica that said nothing has no work: one that has tells every second."""
FORGET_SECONDS = 3600.0
"""After which the counts of a replica that said nothing are forgotten."""
READY_SECONDS = 0.5
"""Between two questions whether the first engine is open."""

log = logging.getLogger(__name__)


class Stream(Protocol):
    """The messages of one call, and a way to end it."""

    def __aiter__(self) -> AsyncIterator[Message]: ...

    def cancel(self) -> Any:
        """Stop."""


class Engines(Protocol):
    """The engine deployment, as the ingress sees it."""

    def draw(self, work: Work) -> Stream:
        """Begin to draw."""

    async def described(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...] | None]]:
        """Ask any replica what it serves; returns once there is one."""


@dataclass(frozen=True)
class Errors:
    """Ray's exceptions: too many wait, a replica or all of them are gone, and what a call that was ended raises."""

    busy: tuple[type[BaseException], ...]
    lost: tuple[type[BaseException], ...]
    unavailable: tuple[type[BaseException], ...]
    cancelled: tuple[type[BaseException], ...] = (asyncio.CancelledError,)


class _Told:
    """Stands where a service's own jobs have a batcher's future."""

    def __init__(self, images: int) -> None:
        self.said: dict[str, Any] = {}
        self._images = images

    def progress(self) -> JobProgress:
        """Return what an engine said last."""
        said = self.said.get
        done, total, images = said("steps", 0), said("total_steps", 0), said("images", 0)
        state = "running" if done else "queued"
        return JobProgress(state, done, total, images, self._images, said("queue_position"), said("seconds_left"))  # type: ignore[arg-type]

    def cancel(self) -> bool:
        """Do nothing: the job's end is heard by whoever follows it."""
        return False


class RemoteModels(Models):
    """Bundles whose manifests are here, and whose engines are elsewhere."""

    def opened(self, model: Model) -> Future[None]:
        """Return a future that is done: engines open their bundles before they serve."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def heard(self, described: dict[str, tuple[str, tuple[tuple[int, int], ...] | None]]) -> None:
        """Take over what engines say of their bundles; raises `LatentRTError` where they have others."""
        for model in self:
            digest, sizes = described.get(model.name, ("", None))
            if digest != model.digest:
                raise LatentRTError(f"bundle {model.name} is another one where engines are: give all nodes the same")
            model.sizes_only = sizes is not None
            model.sizes = model.sizes if sizes is None else sizes
            model.state = "ready"


class RemoteService(Service):
    """A service that lets engines elsewhere draw.

    A request whose replica is gone is drawn once more, with the same seed and so the same picture; if that fails too,
    its client is told to try again.
    """

    def __init__(self, engines: Engines, errors: Errors, models: RemoteModels, limits: Limits | None = None) -> None:
        """Start the thread that follows requests."""
        super().__init__(models, limits)
        self._engines, self._errors = engines, errors
        self._told: dict[str, tuple[float, Mapping[str, Figures]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="latentrt ray", daemon=True)
        self._thread.start()

    @property
    def replicas(self) -> Iterable[tuple[str, str, Figures]]:
        """What each replica said last of its models: what it is at while it has work, and what it has counted."""
        now = time.monotonic()
        for replica, (when, models) in list(self._told.items()):
            for name, figures in models.items() if now - when < FORGET_SECONDS else ():
                yield replica, name, figures if now - when < SILENT_SECONDS else replace(figures, gauges={})

    def open(self) -> None:
        """Wait for the first engine; the service has failed when that serves other bundles."""
        described = asyncio.run_coroutine_threadsafe(self._described(), self._loop).result()
        assert isinstance(self.models, RemoteModels)
        try:
            self.models.heard(described)
        except LatentRTError as error:
            log.critical("%s", error)
            self.fail(error)
        if self.state == "loading":
            self.state = "ready"

    async def _described(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...] | None]]:
        while True:
            try:
                return await self._engines.described()
            except (*self._errors.lost, *self._errors.busy, *self._errors.unavailable) as error:
                log.warning("no engine answers yet: %s", type(error).__name__)
                await asyncio.sleep(READY_SECONDS)

    def _begin(self, job: Job, model: Model) -> None:
        asyncio.run_coroutine_threadsafe(self._follow(job, model), self._loop)

    async def _follow(self, job: Job, model: Model) -> None:
        """Have a job drawn, and see it to its end, at its deadline wherever it is then."""
        loop = asyncio.get_running_loop()
        late = loop.call_later(job.left, self._late, job, model)
        try:
            error = await self._drawn(job)
        except Exception as failure:  # a bug here, or in an engine
            log.exception("job %s failed", job.id)
            error = failure
        late.cancel()
        if error is None:
            self._over(job, model)
        else:
            self._end(job, model, error)

    def _late(self, job: Job, model: Model) -> None:
        """End a job at its deadline, and count it: the engine that has it counts a request that was cancelled."""
        if not job.is_over:
            model.counted["deadlines_missed"] = model.counted.get("deadlines_missed", 0) + 1
            self._end(job, model, _too_late(job))

    async def _drawn(self, job: Job) -> BaseException | None:
        """Return None for a job that is over, and otherwise what ends it."""
        work, errors = job.work, self._errors
        if work.arguments.get("seed") is None:  # so that a second try draws the same
            work = replace(work, arguments={**work.arguments, "seed": secrets.randbits(32)})
        tries = 0
        while not job.is_over:
            if (left := job.left) <= 0:
                return _too_late(job)
            error: BaseException | None = None
            try:
                error = await self._once(job, replace(work, timeout=left))
            except errors.busy:
                error = QueueFullError("more requests wait than may: try later", self._soonest())
            except errors.unavailable:
                return UnavailableError("no engine serves now: try later", "unavailable", RETRY_SECONDS)
            except errors.lost as lost:
                error = UnavailableError(str(lost), "replica_lost")
            except errors.cancelled:  # by the job's end, or by the end of the replica
                error = UnavailableError("the call was ended", "replica_lost")
            if job.is_over:
                return None
            taken = tries or job.state != "loading"  # once: no reason to send it away
            # A replica that has failed takes nothing until Ray has ended it: no device was tried.
            failed = isinstance(error, UnavailableError) and error.code == "failed"
            if failed or (isinstance(error, QueueFullError) and taken):
                await asyncio.sleep(BUSY_SECONDS)
            elif isinstance(error, UnavailableError):
                tries += 1
                if tries == TRIES:
                    return UnavailableError(
                        "the replica that drew this was lost: try again", "replica_lost", RETRY_SECONDS
                    )
                log.warning("job %s has lost its replica, and is drawn again", job.id)
            else:
                return error
        return None

    def _soonest(self) -> float | None:
        """Return the seconds until the first of all requests is done, and leaves its place; None where nobody knows."""
        return min(filter(None, (job.progress["seconds_left"] for job in self.unfinished)), default=None)

    async def _once(self, job: Job, work: Work) -> BaseException | None:
        """Draw a job; return its error, None when it has succeeded. Raises what Ray does."""
        told, loop = _Told(work.images), asyncio.get_running_loop()
        stream = self._engines.draw(work)

        def hear(event: Event) -> None:
            if isinstance(event, Ended):
                loop.call_soon_threadsafe(stream.cancel)

        stop = job.listen(hear)
        try:
            async for message in stream:
                if isinstance(message, Taken):
                    job.size = message.size
                    job.started(told)
                elif isinstance(message, Progress):
                    told.said = message.said
                    if message.step is not None:
                        job.stepped(message.step.index, message.step.done, message.step.total)
                elif isinstance(message, Told):
                    self._told[message.replica] = time.monotonic(), message.figures
                elif isinstance(message, Previewed):
                    job.previewed(message.index, message.number, message.picture)
                elif isinstance(message, Pictured):
                    job.pictured(message.index, message.picture)
                elif isinstance(message, Done):
                    facts = message.facts
                    facts["timings"] = {**facts.get("timings", {}), "total": time.monotonic() - job.arrived}
                    stop()
                    job.end("succeeded", facts=facts)
                    return None
                elif isinstance(message, Failed):
                    stop()
                    return message.error
        finally:
            stop()
        return UnavailableError("an engine gave no answer", "replica_lost", RETRY_SECONDS)

    async def _followed(self) -> None:
        """Wait for the ends of requests to be heard."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    def close(self) -> None:
        """Cancel what is left."""
        super().close()
        asyncio.run_coroutine_threadsafe(self._followed(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _too_late(job: Job) -> DeadlineError:
    """Return what ends a job that has no time left."""
    return DeadlineError(
        f"the result was not there in time, {job.timeout:g} s after its request: give more timeout, or try later"
    )
