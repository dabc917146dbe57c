"""The two TensorRT packages: found, checked and imported, with a logger that keeps their errors for ours.

What a release does not offer is left out by asking for it (`hasattr`), in one place each.
"""

from __future__ import annotations

import importlib
import logging
import re
from functools import cache
from typing import Any

from ..errors import BackendUnavailableError, EngineError, reason

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}

OLD_OPSET = 20
"""The newest opset that the parser of the oldest release reads."""

log = logging.getLogger(__name__)


class Library:
    """One of the two TensorRT packages, with the logger that collects its errors."""

    def __init__(self, backend: str) -> None:
        """Import the package; raises `BackendUnavailableError` when it is missing, broken or too old."""
        self.backend = backend
        try:
            self.trt: Any = importlib.import_module(MODULES[backend])
            self.version = str(self.trt.__version__)
        except Exception as error:  # its modules load native libraries, and fail with whatever these raise
            raise BackendUnavailableError(
                f"backend {backend}: {MODULES[backend]} cannot be imported ({reason(error)}): "
                f"run `pip install 'latentrt[{EXTRAS[backend]}]'`"
            ) from error
        if tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) < OLDEST[backend]:
            oldest = ".".join(map(str, OLDEST[backend]))
            raise BackendUnavailableError(
                f"backend {backend}: {MODULES[backend]} {self.version} is installed, {oldest} or later is needed: "
                f"run `pip install 'latentrt[{EXTRAS[backend]}]'`"
            )
        self.reads_attention = hasattr(self.trt, "IAttention")
        """Whether its parser knows the operator `Attention`, as from TensorRT 10.14 on."""
        self.errors: list[str] = []
        self.logger = self._logger()

    def compute_capabilities(self) -> dict[str, Any]:
        """Return the compute capabilities that plans can be built for without that GPU, such as `8.6`."""
        kinds = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        return {f"{name[2:-1]}.{name[-1]}": kind for name, kind in kinds.items() if name.startswith("SM")}

    def failure(self, what: str) -> EngineError:
        """Return an error with what the library logged since the last one."""
        messages, self.errors[:] = list(dict.fromkeys(self.errors)), []
        why = "; ".join(" ".join(message.split())[:400] for message in messages[:2]) or "the library gave no reason"
        return EngineError(f"{what}: {why}")

    def _logger(self) -> Any:
        trt: Any = self.trt
        errors = self.errors
        levels = {"INTERNAL_ERROR": logging.DEBUG, "ERROR": logging.DEBUG, "WARNING": logging.INFO}

        class Log(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity.name in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(message)
                log.log(levels.get(severity.name, logging.DEBUG), "%s: %s", trt.__name__, message)

        return Log()


load_library = cache(Library)
