"""What this machine's processor is, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def _cpuinfo() -> dict[str, str]:
    """Return the facts of the last processor that the system lists; empty where it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Return what the processor is called."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_identity() -> str:
    """Return the processor's name and instruction sets: what code that was optimized for it depends on."""
    facts = _cpuinfo()
    if not facts:
        return platform.processor() or platform.machine()
    return f"{facts.get('model name', '')} {facts.get('flags', facts.get('Features', ''))}"


def usable_cores() -> int:
    """Return the number of logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
