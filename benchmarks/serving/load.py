"""Open-loop load: requests go out at their times, whatever became of those before; what each one saw is noted.

MLCommons' LoadGen knows one latency bound for all requests and no refusal: here every request has a bound of its own,
and a full queue is an answer. Its Server scenario has the same arrivals.
"""

from __future__ import annotations

import contextlib
import heapq
import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ...engines.errors import EngineError, QueueFullError
from .arrivals import Arrivals, Entry, Outcome
from .servers import arguments

PRESSURE = 3.0
"""At saturation requests are offered so many times as fast as the device could serve them, and again when refused."""
LONGEST = 600.0
"""Seconds after which an answer is taken for lost."""
CONNECTIONS = 256

Ask = Callable[[Entry], "Future[bool]"]
"""Sends a request; the future tells whether it was answered, False when it was refused, and raises for an error."""


class Submits(Protocol):
    """What has a batcher's `submit`."""

    @property
    def submit(self) -> Callable[..., Future[Any]]:
        """What queues a request."""


def in_process(server: Submits, size: tuple[int, int] | None = None) -> Ask:
    """Return what asks a server of this process for pictures of a size (width, height), or of the bundle's own."""

    def ask(entry: Entry) -> Future[bool]:
        answer: Future[bool] = Future()
        try:
            future = server.submit(**arguments(entry.work, entry.index, size))
        except QueueFullError:
            answer.set_result(False)
            return answer

        def over(done: Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is None:
                answer.set_result(True)
            else:
                answer.set_exception(error)

        future.add_done_callback(over)
        return answer

    return ask


class OverHttp:
    """Asks a server over HTTP, on connections that stay open; a context manager."""

    def __init__(self, port: int, size: tuple[int, int] | None = None) -> None:
        """Connect when it is needed, and ask for pictures of a size (width, height), or of the bundle's own."""
        self._port, self._local = port, threading.local()
        self._given = {"response_format": "b64_json"} | ({} if size is None else {"size": "{}x{}".format(*size)})
        self._opened: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(CONNECTIONS, "latentrt load")

    def __call__(self, entry: Entry) -> Future[bool]:
        """Send a request."""
        return self._pool.submit(self._ask, entry)

    def _ask(self, entry: Entry) -> bool:
        body = json.dumps({**arguments(entry.work, entry.index), **self._given})
        status, text = self.post("/v1/images/generations", body)
        if status == 429:
            return False
        if status != 200:
            raise EngineError(f"the server answered {status}: {text[:200]!r}")
        return True

    def post(self, path: str, body: str) -> tuple[int, bytes]:
        """Return status and body of an answer; a connection that the server closed while it was idle is opened anew."""
        kept = getattr(self._local, "connection", None)
        if kept is not None:
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                return self._exchange(kept, path, body)
            kept.close()
        opened = self._local.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONGEST)
        self._opened.append(opened)
        return self._exchange(opened, path, body)

    @staticmethod
    def _exchange(connection: http.client.HTTPConnection, path: str, body: str) -> tuple[int, bytes]:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def __enter__(self) -> OverHttp:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for connection in self._opened:
            connection.close()


def run(ask: Ask, arrivals: Arrivals, *, capacity: float) -> Outcome:
    """Send all requests, wait for all answers, and return what was seen; `capacity` is for saturation alone.

    Raises what an answer that is neither a picture nor a refusal raises.
    """
    load = _Load(ask, arrivals)
    if math.isinf(arrivals.rate):
        load.press(1 / (PRESSURE * capacity))
    else:
        load.at_times()
    return load.outcome()


class _Load:
    def __init__(self, ask: Ask, arrivals: Arrivals) -> None:
        self._ask, self._arrivals = ask, arrivals
        self._changed = threading.Condition()
        self._open = 0
        self._again: list[int] = []
        self._error: BaseException | None = None
        self._start = time.perf_counter() + 0.1

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self._now()))
        if self._error is not None:
            raise self._error

    def at_times(self) -> None:
        """Send every request at its time."""
        for entry, moment in zip(self._arrivals.entries, self._arrivals.moments, strict=True):
            self._until(moment)
            self._send(entry, moment, again=False)

    def press(self, gap: float) -> None:
        """Offer requests in their order, those that were refused again, until each has a place."""
        entries, following, moment = self._arrivals.entries, 0, 0.0
        while True:
            with self._changed:
                while not self._again and following == len(entries) and self._open:
                    self._changed.wait(0.01)
                if not self._again and following == len(entries):
                    return
                index = heapq.heappop(self._again) if self._again else following
            following += index == following
            moment = max(moment + gap, self._now())
            self._until(moment)
            self._send(entries[index], self._now(), again=True)

    def _send(self, entry: Entry, moment: float, *, again: bool) -> None:
        entry.arrived = moment
        with self._changed:
            self._open += 1
        self._ask(entry).add_done_callback(lambda done: self._over(entry, done, again))

    def _over(self, entry: Entry, done: Future[bool], again: bool) -> None:
        now, error = self._now(), done.exception()
        with self._changed:
            self._open -= 1
            if error is not None:
                self._error = error
            elif done.result():
                entry.ended = now
            elif again:
                heapq.heappush(self._again, entry.index)
            self._changed.notify()

    def outcome(self) -> Outcome:
        """Wait for all answers, and return what was seen."""
        end = time.monotonic() + LONGEST
        with self._changed:
            while self._open and self._error is None:
                self._changed.wait(1.0)
                if time.monotonic() > end:
                    raise EngineError(f"{self._open} requests have no answer after {LONGEST:g} s")
        if self._error is not None:
            raise self._error
        entries: Sequence[Entry] = self._arrivals.entries
        last = max((entry.ended for entry in entries if not math.isnan(entry.ended)), default=math.nan)
        return Outcome(entries, span=last - entries[0].arrived)
