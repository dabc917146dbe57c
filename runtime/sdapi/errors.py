"""Errors in the shape that programs written for the web UI read, and a route that answers with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...engines.errors import LatentRTError
from ..server.errors import ApiError, api_error
from .work import renamed

log = logging.getLogger(__name__)


def error_response(error: ApiError) -> Response:
    """Return an error as the web UI has it: its kind, and its text both as `detail` and as `errors`."""
    message = renamed(error.message)
    said = {"error": error.code, "detail": message, "body": "", "errors": message}
    return Response(json.dumps(said, ensure_ascii=False), error.status, error.headers, media_type="application/json")


class Route(APIRoute):
    """A route whose errors have the web UI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handle = super().get_route_handler()

        async def handle_in_shape(request: Request) -> Response:
            try:
                return await handle(request)
            except (ApiError, LatentRTError, ValidationError) as error:
                answer = api_error(error)
            except RequestValidationError as error:
                first = error.errors()[0]
                answer = ApiError(400, f"{first['loc'][-1]}: {first['msg'].lower()}", "invalid_request")
            except HTTPException as error:
                answer = ApiError(error.status_code, str(error.detail), "invalid_request")
            request.scope.setdefault("state", {})["code"] = answer.code
            return error_response(answer)

        return handle_in_shape
