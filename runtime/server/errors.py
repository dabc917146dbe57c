"""What an exception is over HTTP: a status, OpenAI's error object, and headers that say whether to try again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...engines.errors import (
    DeadlineError,
    EngineError,
    LatentRTError,
    QueueFullError,
    RequestError,
    StorageError,
    is_out_of_memory,
    reason,
)
from ..request import problem_of, short
from ..service.errors import BusyError, NotFoundError, RefusedError, UnavailableError, told

MOST_SECONDS = 120.0
"""OpenAI's client does not try again at all when it is told to wait longer."""
GUESS_SECONDS = 1.0
STORAGE_SECONDS = 30.0
"""When to try again where somebody has to make room on a disk."""

FIELDS = {"width": "size", "height": "size", "mask_image": "mask", "num_images_per_prompt": "n"}
"""Arguments of a pipeline's call, and the fields that set them."""

_SUBJECT = re.compile(r"^(\w+) (?:is|has|was|and|of)\b|^(\w+):? ")


class ErrorObject(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What was asked for is not served, or not now."},
    "5XX": {"model": ErrorBody, "description": "The server failed, loads, or shuts down."},
}
"""What OpenAPI says of errors."""


class ApiError(Exception):
    """An answer that is an error: status, message, and what OpenAI's error object says beside it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The answer."""
        return Response(
            json.dumps(self.body, ensure_ascii=False), self.status, self.headers, media_type="application/json"
        )


def retry_headers(seconds: float | None) -> dict[str, str]:
    """Return the headers that tell a client when to try again, never more than it is willing to wait."""
    seconds = min(max(GUESS_SECONDS if seconds is None else seconds, 0.1), MOST_SECONDS)
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def api_error(error: BaseException) -> ApiError:
    """Return what an exception is to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RefusedError):
        status = 422 if error.code == "idempotency_key_reused" else 400
        return ApiError(status, str(error), error.code, param=error.param)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), "invalid_request", param=param_of(str(error)))
    if isinstance(error, ValidationError):
        return validation_error(error)
    if isinstance(error, NotFoundError):
        return ApiError(404, str(error), error.code, param=error.param)
    if isinstance(error, QueueFullError):
        return _too_many(str(error), "queue_full", error.seconds)
    if isinstance(error, BusyError):
        if error.code == "key_busy":
            return _too_many(str(error), error.code, error.seconds)
        return ApiError(503, str(error), error.code, headers=retry_headers(error.seconds))
    if isinstance(error, DeadlineError):
        if error.seconds is not None:  # refused when it came
            return _too_many(str(error), "deadline_infeasible", error.seconds)
        return ApiError(504, str(error), "deadline_exceeded", headers={"x-should-retry": "false"})
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), error.code, headers=retry_headers(error.seconds))
    if isinstance(error, CancelledError):
        return ApiError(409, "the job was cancelled", "cancelled", headers={"x-should-retry": "false"})
    return _server_error(error)


def _too_many(message: str, code: str, seconds: float | None) -> ApiError:
    return ApiError(429, message, code, kind="rate_limit_error", headers=retry_headers(seconds))


def _server_error(error: BaseException) -> ApiError:
    """Return the answer to what is nobody's fault but ours; the text of a bug stays in the log."""
    if isinstance(error, EngineError) and "not finite" in str(error):
        return ApiError(500, str(error), "nan_output", headers={"x-should-retry": "false"})
    if is_out_of_memory(error):
        message = "out of memory: ask for a smaller size or fewer pictures"
        return ApiError(500, message, "out_of_memory", headers={"x-should-retry": "false"})
    if isinstance(error, EngineError):
        return ApiError(500, str(error), "engine_error")
    if (said := told(error)) is not None:
        if isinstance(error, StorageError):
            return ApiError(503, said, "storage", headers=retry_headers(STORAGE_SECONDS))
        return ApiError(500, said, "bundle_damaged", headers={"x-should-retry": "false"})
    if isinstance(error, LatentRTError):
        return ApiError(500, reason(error), "server_error")
    return ApiError(500, "the server failed, which is a bug: its log has the traceback", "internal_error")


def param_of(message: str) -> str | None:
    """Return the field that a message about a request begins with, as the API calls it."""
    from .schema import NAMES

    match = _SUBJECT.match(message)
    name = match and (match[1] or match[2])
    name = FIELDS.get(name or "", name)
    return name if name in NAMES else None


def validation_error(error: ValidationError) -> ApiError:
    """Return the answer to fields of the wrong kind: the first of them, what was given, and what is allowed."""
    kind, where, given, text = problem_of(error)
    param = where[0] if where else None
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {text.removeprefix('invalid JSON: ')}", "invalid_request")
    if kind == "extra_forbidden":
        return ApiError(
            400,
            f"{short(param)} is no field of this request: leave it out; /openapi.json lists those there are",
            "unknown_field",
            param=param,
        )
    if param is None:
        return ApiError(400, f"the body is no object of fields: {text}", "invalid_request")
    said = param if kind == "missing" else f"{param} is {given}"
    return ApiError(400, f"{said}: {text}", "invalid_request", param=param)


def add_handlers(app: FastAPI) -> None:
    """Give every error of an app, also the framework's own, OpenAI's shape."""

    def answer(request: Request, error: ApiError) -> Response:
        request.scope.setdefault("state", {})["code"] = error.code
        return error.response()

    async def handle(request: Request, error: Exception) -> Response:
        return answer(request, api_error(error))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = repr(request.url.path[:100])
        code, message = {
            404: ("not_found", f"there is nothing at {path}: /openapi.json lists what there is"),
            405: ("method_not_allowed", f"{request.method[:20]} is not for {path}: see /openapi.json"),
        }.get(error.status_code, ("invalid_request", str(error.detail)))
        return answer(request, ApiError(error.status_code, message, code, headers=error.headers))

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return answer(request, ApiError(400, f"{name}: {first['msg'].lower()}", "invalid_request", param=name))

    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, validation)
    for kind in (ApiError, LatentRTError, ValidationError):
        app.add_exception_handler(kind, handle)
