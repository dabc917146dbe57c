"""What a service refuses, beside what a batcher does.

RequestError
└── RefusedError      a request over a limit of this service, with the name of its field and a code
LatentRTError
├── NotFoundError     a model or a job that there is not
├── BusyError         too much at once of one key, or no room for another model now: later
└── UnavailableError  a service that loads, drains or has failed
"""

from __future__ import annotations

from concurrent.futures import CancelledError

from ...engines.errors import BundleError, DeadlineError, LatentRTError, QueueFullError, RequestError, StorageError


class RefusedError(RequestError):
    """A request over a limit of this service: `param` names the field, `code` the kind."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class NotFoundError(LatentRTError):
    """A model or a job that there is not."""

    def __init__(self, message: str, param: str | None = None, code: str = "not_found") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class BusyError(LatentRTError):
    """Too much at once; `seconds` is a guess of when to try again, None where there is none."""

    def __init__(self, message: str, code: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.code, self.seconds = code, seconds


class UnavailableError(LatentRTError):
    """A service that takes nothing now; `code` says why."""

    def __init__(self, message: str, code: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.code, self.seconds = code, seconds


def told(error: BaseException) -> str | None:
    """Return what clients are told of errors whose own text names folders of the server; None for others."""
    if isinstance(error, StorageError):
        return "the server's disk is full, or a folder cannot be written: try later; its log says which"
    if isinstance(error, BundleError):
        return "a file of this model is missing or was changed on the server: its log says which"
    return None


def outcome_of(error: BaseException | None) -> str:
    """Return what it is that an error ends: a job that is cancelled, late, refused, or has failed."""
    if isinstance(error, CancelledError):
        return "cancelled"
    if isinstance(error, DeadlineError):
        return "late" if error.seconds is None else "refused"
    draining = isinstance(error, UnavailableError) and error.code == "draining"
    return "refused" if draining or isinstance(error, (RequestError, QueueFullError, BusyError)) else "failed"
