"""Engines: the bundle format, and building, caching, opening and executing its graphs on a backend."""

from __future__ import annotations

import os

# ONNX Runtime from 1.29 on reports its use to its maker unless this is set before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
