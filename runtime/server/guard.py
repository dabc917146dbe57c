"""Clients that send or read too slowly, send too much, or are too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .context import NOWHERE, QUIET, Note, new_id, note_answer
from .errors import ApiError, retry_headers
from .metrics import Metrics
from .settings import HttpSettings

LOOK_SECONDS = 1.0
"""How often connections are looked at."""
GRACE = 5.0
"""Seconds that an answer to a slow client has before its connection is cut."""
SPARE = 100
"""Connections beyond the most that are answered, all further ones are cut."""
CROWDED = "crowded"
"""Noted with requests of connections beyond the most."""
MAX_HEAD, PIECE = 1 << 16, 1 << 14
"""Bytes of a request's head, or of anything else beside its body; and bytes that are parsed before they are counted."""


class Guard:
    """ASGI middleware that reads bodies: no more than they may have, and no longer than they may take.

    What comes over a connection too many is refused, but not the probes and readers of metrics that a busy server
    lives by.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        """Guard `app`."""
        self._app, self._most, self._timeout = app, settings.max_body, settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if CROWDED in scope.get("state", {}) and scope["path"] not in QUIET:
            said = "too many connections are open: try later"
            raise ApiError(503, said, "too_many_connections", headers=retry_headers(1.0))
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._most:
            raise self._too_large()
        end, read, complete = time.monotonic() + self._timeout, 0, False

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise ApiError(
                    408,
                    f"the body has not come within {self._timeout:g} s: send it faster",
                    "body_timeout",
                    headers={"connection": "close", "x-should-retry": "false"},
                ) from error
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most:
                    raise self._too_large()
                complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes: send less", "body_too_large")


def _crowded(app: ASGIApp) -> ASGIApp:
    """Return `app` for a connection beyond the most, which is closed once it has an answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((b"connection", b"close"))
            await send(message)

        scope["state"][CROWDED] = True
        await app(scope, receive, closing)

    return answer


def protocol_of(settings: HttpSettings, note: Note) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with connections that are counted, and that know how long they have waited.

    `note` is told of answers to what is no request.
    """

    class Connection(HttpToolsProtocol):
        """One connection; `look_at` cuts it."""

        waits_since: float | None = None
        """Since when a head or a body is awaited, that has not come whole."""
        stalled: tuple[int, float] = (0, 0.0)
        """Bytes that wait to be sent, and since when they are no fewer."""
        beside: int = 0
        """Bytes since the last one of a body, or since the end of a head."""
        refused = False
        """Whether what comes is thrown away, until the client has read why and closes, or is cut."""

        def connection_made(self, transport: Any) -> None:
            """Answer, or refuse, or cut a new connection."""
            super().connection_made(transport)
            self.waits_since = time.monotonic()
            if len(self.connections) > settings.max_connections + SPARE:
                transport.abort()
            elif len(self.connections) > settings.max_connections:
                self.app = _crowded(self.app)

        def data_received(self, data: bytes) -> None:
            """Parse what comes, unless it is more of a head than there may be."""
            for begin in range(0, len(data), PIECE):
                if self.refused or self.transport.is_closing():
                    return
                piece = data[begin : begin + PIECE]
                self.beside += len(piece)
                super().data_received(piece)
                if self.beside > MAX_HEAD and not self.transport.is_closing():
                    self._refuse_head()

        def _refuse_head(self) -> None:
            """Answer to a head or to trailers that are too large; where another answer is due before, cut."""
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                if cycle.response_started or not cycle.more_body:
                    self.transport.abort()
                    return
                cycle.disconnected = True
                cycle.message_event.set()
            self.refused = True
            said = f"the head of the request, or its trailers, have more than {MAX_HEAD} bytes: send less"
            self._answer(ApiError(431, said, "head_too_large"))
            self.transport.write_eof()

        def on_headers_complete(self) -> None:
            """Note the end of a head."""
            self.beside = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            """Note bytes of a body."""
            self.beside = 0
            super().on_body(body)

        def on_message_begin(self) -> None:
            """Note the first byte of a request."""
            super().on_message_begin()
            self.waits_since = time.monotonic()

        def on_message_complete(self) -> None:
            """Note the last byte of a request."""
            super().on_message_complete()
            self.waits_since, self.beside = None, 0

        def send_400_response(self, msg: str) -> None:
            """Answer to what is no HTTP."""
            self._answer(ApiError(400, msg[0].lower() + msg[1:].rstrip("."), "invalid_http"))
            self.transport.close()

        def _answer(self, error: ApiError) -> None:
            """Answer to what no application sees."""
            state = {"request_id": new_id(), "code": error.code}
            note_answer(note, state, NOWHERE, NOWHERE, error.status, 0.0, (self.client or ("",))[0])
            body = bytes(error.response().body)
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json"]
            head += [f"content-length: {len(body)}", f"x-request-id: {state['request_id']}"]
            self.transport.write("\r\n".join([*head, "connection: close", "", ""]).encode() + body)

    return Connection


def look_at(connections: Iterable[Any], settings: HttpSettings) -> None:
    """Cut the connections that keep the server waiting: for a head, for a body, or for room to write."""
    now = time.monotonic()
    for connection in list(connections):
        since = connection.waits_since
        # A body that is late is answered by `Guard`; a head, or a client that sends on after its answer, is cut.
        if since is not None and now - since > settings.body_timeout + (GRACE if connection.cycle else 0.0):
            connection.transport.abort()
            continue
        waiting = connection.transport.get_write_buffer_size()
        before, at = connection.stalled
        if waiting == 0 or waiting < before or before == 0:
            connection.stalled = (waiting, now)
        elif now - at > settings.send_timeout:
            connection.transport.abort()
        else:
            connection.stalled = (waiting, at)


async def watch_connections(connections: Collection[Any], settings: HttpSettings, metrics: Metrics) -> None:
    """Look at connections again and again, and note how many there are."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        look_at(connections, settings)
        metrics.open_connections = len(connections)
