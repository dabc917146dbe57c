"""Faults that must make a test fail: for each a name, a path, what stands there, and what it becomes."""

from __future__ import annotations

from planted_engines import ENGINES
from planted_gpu import GPU
from planted_loop import LOOP
from planted_runtime import RUNTIME

PLANTED: list[tuple[str, str, str, str]] = [*ENGINES, *GPU, *LOOP, *RUNTIME]
