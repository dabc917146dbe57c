"""OpenVINO's package, imported without what it would send."""

from __future__ import annotations

import sys
from types import ModuleType

TELEMETRY = "openvino_telemetry"


def load_openvino() -> ModuleType:
    """Return OpenVINO's package; raises `ImportError` where it is not installed.

    Its first import sends an event to an analytics server, and keeps an id of the user in the home folder, unless the
    package that does so is missing; so it is missing while we import it first. A program that has imported OpenVINO
    itself has made its own choice.
    """
    if "openvino" in sys.modules:
        import openvino

        return openvino
    there = TELEMETRY in sys.modules
    if not there:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino

        return openvino
    finally:
        if not there:
            del sys.modules[TELEMETRY]
