"""Every error latentrt raises on purpose.

    LatentRTError
    ├── RequestError              a flag, prompt, size, seed or image that cannot be served as given
    ├── CheckpointError           a source checkpoint that cannot be read or converted
    │   └── UnsupportedModelError     readable, but of a family or with an option latentrt does not export
    ├── SchedulerError            a scheduler config that no step table can express
    ├── BundleError               a bundle that is missing, damaged, of another version, or unsafe
    ├── ExportError               an export that ran and failed, or failed its own parity check
    ├── EngineError               an engine that could not be built, opened or executed
    │   ├── BackendUnavailableError   a backend whose library, driver or device is missing
    │   ├── MissingPlanError          an engine that is not in the cache, where building is not allowed
    │   └── ShapeError                tensors that do not fit an engine's profile or a graph's shapes
    ├── QueueFullError            more work than a batcher lets wait
    ├── DeadlineError             a result that was not there in time
    ├── StorageError              a file that could not be written (disk full, permissions)
    └── MissingExtraError         an optional dependency that is not installed

A message says what was given, what is allowed, and what to do, in one line.
"""

from __future__ import annotations

import errno
import re

__all__ = [
    "BackendUnavailableError",
    "BundleError",
    "CheckpointError",
    "DeadlineError",
    "EngineError",
    "ExportError",
    "LatentRTError",
    "MissingExtraError",
    "MissingPlanError",
    "QueueFullError",
    "RequestError",
    "SchedulerError",
    "ShapeError",
    "StorageError",
    "UnsupportedModelError",
    "is_out_of_memory",
    "reason",
]

NEEDS_LESS = "use a smaller size, fewer pictures at a time or --low-memory, or stop other programs"

_NO_MEMORY = re.compile(
    r"out.?of.?memory|bad.?alloc|failed to allocate|unable to allocate|cannot allocate memory|arena alloc failed"
    r"|could not be allocated|available memory of \d+ is smaller|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on a device or on the host: libraries say so in exceptions of many kinds."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return bool(_NO_MEMORY.search(str(error)))


def reason(error: BaseException) -> str:
    """Return the first line of what a third party's exception says, or else its name: fit for the end of a message.

    Of memory that ran out it says what needs less: the libraries' own texts name lines of their source.
    """
    if is_out_of_memory(error) and not isinstance(error, LatentRTError):
        return f"out of memory: {NEEDS_LESS}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LatentRTError(Exception):
    """Root of every error raised on purpose; its text is one line fit for a user."""


class RequestError(LatentRTError, ValueError):
    """A request that cannot be served as given."""


class CheckpointError(LatentRTError):
    """A source checkpoint that cannot be read or converted."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint of a family, or with an option, that latentrt does not export."""


class SchedulerError(LatentRTError, ValueError):
    """A scheduler config or sampler name that no step table can express."""


class BundleError(LatentRTError):
    """A bundle that is missing, damaged, of another format version, or unsafe."""


class ExportError(LatentRTError):
    """An export that failed, or whose graphs disagree with the modules they came from."""


class EngineError(LatentRTError):
    """An engine that could not be built, opened or executed."""


class BackendUnavailableError(EngineError):
    """A backend whose library, driver or device is missing on this machine."""


class MissingPlanError(EngineError):
    """An engine that the cache does not have, while building one is not allowed."""


class ShapeError(EngineError, ValueError):
    """Tensors that do not fit an engine's profile or a graph's declared shapes."""


class QueueFullError(LatentRTError):
    """More work than a batcher lets wait; `seconds` is about when there will be room, None where nothing was timed."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class DeadlineError(LatentRTError, TimeoutError):
    """A result that was not there in time, or cannot be: `seconds` is then how long it will take, otherwise None."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class StorageError(LatentRTError, OSError):
    """A file or folder that could not be written."""


class MissingExtraError(LatentRTError, ImportError):
    """An optional dependency that is not installed; the text holds the pip command."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs packages that are not installed: run `pip install 'latentrt[{extra}]'`")
