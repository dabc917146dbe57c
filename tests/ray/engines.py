"""Engines in this process in place of Ray's replicas: calls that are queued, lost and cancelled as Ray's are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from latentrt.runtime.ray.engine import Engine
from latentrt.runtime.ray.service import Errors
from latentrt.runtime.ray.wire import Message
from latentrt.runtime.service import Work


class BusyError(Exception):
    pass


class LostError(Exception):
    pass


class GoneError(Exception):
    pass


class EndedError(Exception):
    pass


ERRORS = Errors(busy=(BusyError,), lost=(LostError,), unavailable=(GoneError,), cancelled=(EndedError,))


class Call:
    """One call of `draw`: what a replica yields, until it is cancelled or its replica is killed."""

    def __init__(self, engines: Engines, work: Work, fault: BaseException | None) -> None:
        self.work, self.messages = work, list[Message]()
        self._engines, self._fault = engines, fault
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Message]:
        if self._fault is not None:
            raise self._fault
        stream = self._engines.engine.draw(self.work)
        try:
            while True:
                step: Any = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
                await asyncio.wait((step, self._ended), return_when=asyncio.FIRST_COMPLETED)
                if self._ended.done():
                    step.cancel()
                    await asyncio.wait((step,))
                    self._ended.result()
                try:
                    message = step.result()
                except StopAsyncIteration:
                    return
                self.messages.append(message)
                yield message
        finally:
            await stream.aclose()
            self.closed = True

    def cancel(self) -> None:
        self.kill(EndedError())

    def kill(self, error: BaseException) -> None:
        """Let the call raise from now on; from any thread."""
        self._loop.call_soon_threadsafe(lambda: None if self._ended.done() else self._ended.set_exception(error))


class Engines:
    """The deployment, of one replica; `faults` are what the next calls raise at once, None for no fault."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.calls = engine, list[Call]()
        self.faults: list[BaseException | None] = []
        self.described_as: dict[str, Any] | None = None
        self.late: list[BaseException] = []
        """What asking for a description raises, one after the other."""

    def draw(self, work: Work) -> Call:
        call = Call(self, work, self.faults.pop(0) if self.faults else None)
        self.calls.append(call)
        return call

    async def described(self) -> dict[str, Any]:
        if self.late:
            raise self.late.pop(0)
        return self.engine.described() if self.described_as is None else self.described_as
