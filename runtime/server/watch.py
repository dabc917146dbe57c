"""A job's events on an event loop, and clients that go away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Request

from ..service import Ended, Event, Job, Service

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Events:
    """The events of a job, an asynchronous iterator that ends behind `Ended`; a context manager."""

    def __init__(self, job: Job) -> None:
        """Listen from now on."""
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def hear(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        self._stop = job.listen(hear)

    async def next(self, timeout: float | None = None) -> Event | None:
        """Return the next event, or None when it does not come in so many seconds."""
        if timeout is None:
            return await self._queue.get()
        try:
            return await asyncio.wait_for(self._queue.get(), timeout)
        except asyncio.TimeoutError:
            return None

    async def until_over(self) -> Ended:
        """Return the last event."""
        while not isinstance(event := await self._queue.get(), Ended):
            pass
        return event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            yield (event := await self._queue.get())
            if isinstance(event, Ended):
                return

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more; calling it again does nothing."""
        self._stop()


async def unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """Return what `work` returns; raises `ClientGoneError`, and cancels it, when the client goes away before."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Workers:
    """A service's threads for what would hold up the event loop: parsing, pictures, a batcher's checks."""

    def __init__(self, service: Service) -> None:
        """Run functions until the service is closed."""
        self._pool = service.requests

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
