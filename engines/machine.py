"""What this machine's processor is, and how much of it this process may use."""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path, PurePosixPath


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


def processor_flags() -> frozenset[str]:
    """Return the instruction sets that the processor names, such as `avx512_bf16`; empty where it names none."""
    facts = _cpuinfo()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())


def has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16."""
    return not processor_flags().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def processor_identity() -> str:
    """Return the processor's name and instruction sets: what code that was optimized for it depends on."""
    facts = _cpuinfo()
    if not facts:
        return platform.processor() or platform.machine()
    return f"{facts.get('model name', '')} {facts.get('flags', facts.get('Features', ''))}"


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of logical processors that this process may run on, at least 1.

    That is what its affinity allows, or less where the quota of a container (cgroup version 1 or 2) is less; a part of
    a processor counts as one.
    """
    quota = _quota(cgroups, own)
    allowed = len(_allowed())
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def physical_cores(
    processors: Path = Path("/sys/devices/system/cpu"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Return how many threads of arithmetic are worth running: usable cores, with hyperthreads of one counted once."""
    cores = {_siblings(processors, number) for number in _allowed()}
    return max(1, min(len(cores), usable_cores(cgroups, own)))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _siblings(processors: Path, number: int) -> str:
    """Return what the hyperthreads of one core have in common; processors that the system does not list stand alone."""
    text = _text(processors / f"cpu{number}" / "topology" / "thread_siblings_list")
    return text or str(number)


def _quota(cgroups: Path, own: Path) -> float | None:
    """Return how many processors' time the process may use, or None without a limit.

    A limit of any group around the process holds for it too. In a container the paths that the process is told may be
    those outside, so the root of what is mounted counts as well.
    """
    limits = (_limit(folder) for folder in _groups("cpu", cgroups, own))
    return min((limit for limit in limits if limit is not None), default=None)


def memory_limit(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes of memory that a container (cgroup version 1 or 2) leaves this process, or None without a limit.

    Version 1 says a number larger than any machine's memory where there is none.
    """
    texts = (
        _text(folder / name)
        for folder in _groups("memory", cgroups, own)
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def _groups(controller: str, cgroups: Path, own: Path) -> list[Path]:
    """Return the folders of the groups around the process that may limit what a controller counts."""
    found = []
    for line in _text(own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",") if controllers else []
        if names and controller not in names:
            continue
        mounts = [cgroups / controllers, cgroups / controller] if names else [cgroups, cgroups / "unified"]
        parts = PurePosixPath(path.lstrip("/")).parts
        parts = () if ".." in parts else parts  # a group outside what this process may see
        found += [mount.joinpath(*parts[:depth]) for mount in mounts for depth in range(len(parts) + 1)]
    return found


def _limit(group: Path) -> float | None:
    """Return the processors' time that one group is limited to, or None."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # `max`, or nothing there
        return None
    return share if share > 0 else None  # version 1 says -1 for no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
