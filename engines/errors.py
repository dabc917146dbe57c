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
    │   └── ShapeError                tensors that do not fit an engine's profile or a graph's shapes
    ├── StorageError              a file that could not be written (disk full, permissions)
    └── MissingExtraError         an optional dependency that is not installed

A message says what was given, what is allowed, and what to do, in one line.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "LatentRTError",
    "MissingExtraError",
    "RequestError",
    "SchedulerError",
    "ShapeError",
    "StorageError",
    "UnsupportedModelError",
    "reason",
]


def reason(error: BaseException) -> str:
    """Return the first line of what a third party's exception says, or else its name: fit for the end of a message."""
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


class ShapeError(EngineError, ValueError):
    """Tensors that do not fit an engine's profile or a graph's declared shapes."""


class StorageError(LatentRTError, OSError):
    """A file or folder that could not be written."""


class MissingExtraError(LatentRTError, ImportError):
    """An optional dependency that is not installed; the text holds the pip command."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs packages that are not installed: run `pip install 'latentrt[{extra}]'`")
