"""Clients that send or read too slowly, send too much, or are too many."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Collection, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError, retry_headers
from .metrics import Metrics
from .settings import HttpSettings

LOOK_SECONDS = 1.0
"""How often connections are looked at."""
GRACE = 5.0
"""Seconds that an answer to a slow client has before its connection is cut."""
SPARE = 100
"""Connections beyond the most that are answered, all further ones are cut."""


class Guard:
    """ASGI middleware that reads bodies: no more than they may have, and no longer than they may take."""

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        """Guard `app`."""
        self._app, self._most, self._timeout = app, settings.max_body, settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {**retry_headers(1.0), "connection": "close"}
    error = ApiError(503, "too many connections are open: try later", "too_many_connections", headers=headers)
    await error.response()(scope, receive, send)


def protocol_of(settings: HttpSettings) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with connections that are counted, and that know how long they have waited."""

    class Connection(HttpToolsProtocol):
        """One connection; `look_at` cuts it."""

        waits_since: float | None = None
        """Since when a head or a body is awaited, that has not come whole."""
        stalled: tuple[int, float] = (0, 0.0)
        """Bytes that wait to be sent, and since when they are no fewer."""

        def connection_made(self, transport: Any) -> None:
            """Answer, or refuse, or cut a new connection."""
            super().connection_made(transport)
            self.waits_since = time.monotonic()
            if len(self.connections) > settings.max_connections + SPARE:
                transport.abort()
            elif len(self.connections) > settings.max_connections:
                self.app = _too_many

        def on_message_begin(self) -> None:
            """Note the first byte of a request."""
            super().on_message_begin()
            self.waits_since = time.monotonic()

        def on_message_complete(self) -> None:
            """Note the last byte of a request."""
            super().on_message_complete()
            self.waits_since = None

        def send_400_response(self, msg: str) -> None:
            """Answer to what is no HTTP."""
            error = ApiError(400, msg[0].lower() + msg[1:].rstrip("."), "invalid_http")
            body = bytes(error.response().body)
            head = ["HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}"]
            head += [f"x-request-id: req-{secrets.token_hex(12)}", "connection: close", "", ""]
            self.transport.write("\r\n".join(head).encode() + body)
            self.transport.close()

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
