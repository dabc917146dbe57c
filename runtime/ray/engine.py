"""The deployment that draws: a service of its own in every replica, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from ...engines.errors import EngineError
from ..service import Ended, Event, Job, Models, Pictured, Previewed, Service, Stepped, Work
from ..service.counts import fault_of
from ..service.errors import UnavailableError
from ..service.names import named_bundles
from .settings import RaySettings
from .wire import Done, Failed, Message, Progress, Taken, Told

STEP_SECONDS = 0.1
"""Between steps that are told: a message costs about as much as a step of a small model."""
TELL_SECONDS = 1.0
"""After which it is told where in the queue a request is, and what the batchers are at."""


class Engine:
    """One replica. Nothing of Ray is needed here."""

    def __init__(self, settings: RaySettings) -> None:
        """Open the bundles and warm up; raises as `Service.open` does."""
        self._settings = settings
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        models = Models(named_bundles(settings.bundles), settings.model, aliases=settings.aliases)
        self.service = Service(models, settings.limits)
        self.service.open()

    def described(self) -> dict[str, tuple[str, tuple[tuple[int, int], ...] | None]]:
        """Return the digest of each bundle, and the only sizes that it draws, None for any."""
        return {model.name: (model.digest, model.allowed) for model in self.service.models}

    async def draw(self, work: Work) -> AsyncIterator[Message]:
        """Yield what happens to a request, `Done` or `Failed` at the end; whoever stops listening cancels it."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Event]()
        with contextlib.suppress(EngineError):  # the service then refuses it: Ray itself asks every few seconds
            self.check_health()
        submitted = loop.run_in_executor(self.service.requests, self.service.submit, work)
        try:
            job = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel)
            raise
        except Exception as error:
            yield Failed.of(error)
            return
        stop = job.listen(lambda event: _tell(loop, heard, event))
        try:
            yield Taken(job.size)
            told = -math.inf
            async for message in _messages(job, heard):
                if isinstance(message, Done | Failed) or time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    yield self.told()
                yield message
        finally:
            stop()
            job.cancel()  # does nothing to one that is over

    def told(self) -> Told:
        """Return what the batchers are at."""
        return Told(self._name, {model.name: model.figures for model in self.service.models})

    def check_health(self) -> None:
        """Raise when the replica is no good any more, and take nothing more: Ray starts another in its place."""
        if self.service.state == "failed":
            raise EngineError("the device has failed")
        for model in self.service.models:
            if (fault := fault_of(model.name, model.batcher, self._settings.step_timeout)) is not None:
                self._fail(fault)

    def _fail(self, what: str) -> NoReturn:
        """Have the ingress draw elsewhere what is here: this replica is the emptiest until Ray has ended it."""
        self.service.fail(UnavailableError("the device fails: try again", "replica_lost"))
        raise EngineError(what)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the seconds of work that everything taken still needs."""
        batchers = [model.batcher for model in self.service.models if model.batcher is not None]
        return {"queue_seconds": float(sum(batcher.stats().work_seconds for batcher in batchers))}

    def __del__(self) -> None:
        """Close what was opened, if it was."""
        if (service := vars(self).get("service")) is not None:
            service.close()


async def _messages(job: Job, heard: asyncio.Queue[Event]) -> AsyncIterator[Message]:
    told = 0.0
    while True:
        try:
            event = await asyncio.wait_for(heard.get(), TELL_SECONDS)
        except asyncio.TimeoutError:
            yield Progress(job.progress)
            continue
        now = time.monotonic()
        if isinstance(event, Stepped) and (event.done == event.total or now - told >= STEP_SECONDS):
            told = now
            yield Progress(job.progress, event)
        elif isinstance(event, Previewed | Pictured):
            yield event
        elif isinstance(event, Ended):
            yield Done(job.facts) if event.error is None else Failed.of(event.error)
            return


def _tell(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(heard.put_nowait, event)


def _cancel(submitted: asyncio.Future[Job]) -> None:
    """Cancel a job that was submitted when nobody wanted it any more."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def replicas(ctx: Any, seconds: float) -> int:
    """Return how many replicas hold the work that there is, at so many seconds of it each."""
    found = ctx.aggregated_metrics.get("queue_seconds", {}) if ctx.aggregated_metrics else {}
    return int(-(-sum(found.values()) // seconds))


class QueuePolicy:
    """Ray's autoscaling policy: work in seconds of steps, as every replica counts it."""

    def __init__(self, seconds: float) -> None:
        """Let every replica have work for so many seconds."""
        self._seconds = seconds

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas that is wanted, before Ray's own bounds and delays, and what is remembered."""
        return max(replicas(ctx, self._seconds), ctx.capacity_adjusted_min_replicas), {}
