"""Around every request: its id and trace, whose it is, one line in the log, and an answer in shape whatever fails."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Keys
from .errors import ApiError, api_error
from .metrics import GONE
from .watch import ClientGoneError

REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")
TRACE = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

log = logging.getLogger(__name__)
ACCESS = logging.getLogger("latentrt.access")

NOTED = ("request_id", "trace_id", "span_id", "parent_id", "job", "model", "code")
QUIET = ("/health", "/v2/health/live", "/v2/health/ready", "/metrics")
"""Routes that are asked every few seconds."""
NOWHERE = "(none)"
"""The route of what reached none, and the method of what was no request."""

Note = Callable[[str, str, int, float, "str | None"], None]
"""Is told of a request: method, route, status, seconds, and the code of its error."""

Shape = Callable[[str, ApiError], Response]
"""Returns the answer to a request for a path that ended with an error."""


class Context:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, keys: Keys, note: Note, shape: Shape) -> None:
        """Answer for `app`."""
        self._app, self._keys, self._note, self._shape = app, keys, note, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        state, began, status = scope.setdefault("state", {}), time.perf_counter(), 0
        given = headers.get(b"x-request-id", "")
        state["request_id"] = given if REQUEST_ID.fullmatch(given) else new_id()
        trace = TRACE.fullmatch(headers.get(b"traceparent", ""))
        if trace and set(trace[1]) != {"0"} and set(trace[2]) != {"0"}:
            state["trace_id"], state["span_id"] = trace[1], secrets.token_hex(8)
            state["trace_flags"], state["parent_id"] = trace[3], trace[2]

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).extend(self._headers(state))
            await send(message)

        try:
            state["owner"] = self._keys.owner(scope["path"], headers)
            await self._app(scope, receive, answered)
        except (ClientGoneError, ClientDisconnect):
            status, state["code"] = GONE, "client_gone"
        except Exception as error:
            answer = api_error(error)
            state["code"] = answer.code
            if not isinstance(error, ApiError):
                log.exception("request %s failed", state["request_id"])
            if status:  # the answer has begun: a break is the only thing left to say
                raise
            await self._shape(scope["path"], answer)(scope, receive, answered)
        finally:
            self._end(scope, status or GONE, time.perf_counter() - began)

    @staticmethod
    def _headers(state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
        found = [(b"x-request-id", state["request_id"].encode("latin-1"))]
        if "trace_id" in state:
            parent = f"00-{state['trace_id']}-{state['span_id']}-{state['trace_flags']}"
            found.append((b"traceparent", parent.encode()))
        return found

    def _end(self, scope: Scope, status: int, seconds: float) -> None:
        """Note a request. Of its path the route alone: what a client wrote there need not be in a log."""
        route = getattr(scope.get("route"), "path", NOWHERE)
        client = (scope.get("client") or ("",))[0]
        note_answer(self._note, scope["state"], scope["method"][:20], route, status, seconds, client)


def new_id() -> str:
    """Return the id of a request that brings none."""
    return f"req-{secrets.token_hex(12)}"


def note_answer(
    note: Note, state: Mapping[str, Any], method: str, route: str, status: int, seconds: float, client: str
) -> None:
    """Count an answer, and write its line into the log."""
    note(method, route, status, seconds, state.get("code"))
    extra = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), "client": client}
    extra |= {name: state[name] for name in NOTED if name in state}
    level = logging.DEBUG if route in QUIET else logging.INFO
    said = [state["request_id"], *([state["code"]] if "code" in state else [])]
    ACCESS.log(level, "%s %s %d %.3f s %s", method, route, status, seconds, " ".join(said), extra=extra)


class JsonLines(logging.Formatter):
    """One JSON object a line, with what was said beside the message."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {name: value for name, value in vars(record).items() if name not in self._KNOWN}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


@contextmanager
def logs(*, as_json: bool = False, access: bool = True) -> Iterator[None]:
    """Log what a server does inside the block, unless the process was told to be quiet."""
    handlers, ours = logging.getLogger().handlers, logging.getLogger("latentrt")
    before = ours.level, ACCESS.disabled, [handler.formatter for handler in handlers]
    if ours.level == logging.WARNING:
        ours.setLevel(logging.INFO)
    ACCESS.disabled = not access
    for handler in handlers if as_json else ():
        handler.setFormatter(JsonLines())
    try:
        yield
    finally:
        for handler, formatter in zip(handlers, before[2], strict=False):
            handler.setFormatter(formatter)
        ours.setLevel(before[0])
        ACCESS.disabled = before[1]
