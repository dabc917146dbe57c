"""What an exception is to Triton, and what metrics call it."""

from __future__ import annotations

from concurrent.futures import CancelledError

from ...engines.errors import DeadlineError, QueueFullError, RequestError, StorageError
from ..service.errors import BusyError, NotFoundError, RefusedError, UnavailableError


def code_of(error: BaseException) -> str:
    """Return the name of Triton's code for an exception."""
    if isinstance(error, RequestError):
        return "INVALID_ARG"
    if isinstance(error, NotFoundError):
        return "NOT_FOUND"
    if isinstance(error, QueueFullError | BusyError | UnavailableError | DeadlineError | StorageError):
        return "UNAVAILABLE"
    return "CANCELLED" if isinstance(error, CancelledError) else "INTERNAL"


def reason_of(error: BaseException) -> str | None:
    """Return what the HTTP server counts a request that was not taken by; None where it counts a failure."""
    if isinstance(error, RefusedError | NotFoundError | BusyError | UnavailableError):
        return error.code
    if isinstance(error, RequestError):
        return "invalid_request"
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, DeadlineError):
        return None if error.seconds is None else "deadline_infeasible"
    return "storage" if isinstance(error, StorageError) else None
