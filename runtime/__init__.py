"""Runtime: prompt to image without PyTorch. What users import is here; everything is loaded at its first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..engines.errors import (
        BackendUnavailableError,
        BundleError,
        DeadlineError,
        EngineError,
        LatentRTError,
        QueueFullError,
        RequestError,
        SchedulerError,
        StorageError,
    )
    from .batcher import Batcher
    from .loop.session import Session
    from .pipeline import Pipeline
    from .request import GenerationRequest
    from .result import GenerationResult, Timings

__all__ = [
    "BackendUnavailableError",
    "Batcher",
    "Bundle",
    "BundleError",
    "DeadlineError",
    "EngineError",
    "GenerationRequest",
    "GenerationResult",
    "LatentRTError",
    "Pipeline",
    "QueueFullError",
    "RequestError",
    "SchedulerError",
    "Session",
    "StorageError",
    "Timings",
]

_HOMES = {
    "Batcher": ".batcher",
    "Bundle": "..engines.bundle",
    "GenerationRequest": ".request",
    "GenerationResult": ".result",
    "Pipeline": ".pipeline",
    "Session": ".loop.session",
    "Timings": ".result",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "..engines.errors"), __name__), name)


def __dir__() -> list[str]:
    return __all__
