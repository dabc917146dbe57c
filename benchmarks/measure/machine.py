"""The machine and its state: what every record says about where its numbers come from."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ...engines.machine import processor_name, usable_cores

QUIET = 0.10
"""Share of the machine that others may use before a measurement counts as disturbed."""


def describe_machine() -> dict[str, Any]:
    """Return what does not change between runs: processor, memory, system, GPU with its driver."""
    meter = DeviceMeter.open()
    gpu = meter.describe() if meter else None
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": gpu,
    }


def default_device() -> str:
    """Return `cuda` where an NVIDIA GPU answers, else `cpu`."""
    return "cuda" if DeviceMeter.open() else "cpu"


def machine_slug(machine: dict[str, Any]) -> str:
    """Return a file name for a machine's records, such as `amd-epyc-2-cores`."""
    what = f"{machine['gpu']['name']}" if machine.get("gpu") else f"{machine['processor']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", what.lower())).strip("-")


def source_version() -> str:
    """Return the commit of the source tree, `-dirty` when it was changed, or the installed version."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("latentrt")


def stamp(watch: LoadWatch, device: str, command: str) -> dict[str, Any]:
    """Return what a record says about when, where and how it was made, for measurements of one program."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source_version(),
        "machine": describe_machine(),
        "command": command,
        "conditions": {"threads": usable_cores(), "device": device, **watch.finish()},
    }


class LoadWatch:
    """How much of the machine others used while something was measured."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._start = time.monotonic()
        self._others = _seconds_of_others()

    def finish(self) -> dict[str, Any]:
        """Return the load average before and after, and the share of all cores that other processes used between."""
        capacity = max(1e-9, (time.monotonic() - self._start) * (psutil.cpu_count() or 1))
        others = max(0.0, (_seconds_of_others() - self._others) / capacity)
        return {
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others_share": round(others, 3),
            "quiet": others <= QUIET,
        }


def _seconds_of_others() -> float:
    """Return the processor time that everything but this process and its children has used since the system started."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - sum(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = sum(psutil.Process().cpu_times()[:2]) + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            ours += sum(child.cpu_times()[:2])
        except psutil.Error:  # it has just ended
            continue
    return float(busy - ours)


class DeviceMeter:
    """Memory and energy of an NVIDIA GPU through NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls) -> DeviceMeter | None:
        """Return a meter for the first GPU, or None without one."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
        except Exception:  # no package, no driver, no device: all mean that there is nothing to read
            return None

    def describe(self) -> dict[str, Any]:
        """Return name, memory, driver and the clocks at this moment."""
        nvml, handle = self._nvml, self._handle
        return {
            "name": nvml.nvmlDeviceGetName(handle),
            "memory_gib": round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        }

    def memory_bytes(self) -> int:
        """Return the bytes in use on the device, by all processes."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def energy_joules(self) -> float | None:
        """Return the energy used since the driver was loaded, or None where the device does not count it."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None
