"""The machine and its state: what every record says about where its numbers come from."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ...engines.machine import memory_limit, processor_name, usable_cores

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


def memory_bytes(device: str) -> int:
    """Return all the memory of the processor's side that this process may use, or for `cuda` of the first GPU."""
    meter = DeviceMeter.open() if device == "cuda" else None
    if meter:
        return int(meter.describe()["memory_gib"] * 2**30)
    total, limit = int(psutil.virtual_memory().total), memory_limit()
    return total if limit is None else min(total, limit)


def source_version() -> str:
    """Return the commit of the source tree, `-dirty` when it was changed, or the installed version."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("latentrt")


def stamp(watch: LoadWatch, command: str, device: str, threads: int | None = None, **conditions: Any) -> dict[str, Any]:
    """Return what every record says first: when, where, from which source and how it was made.

    `conditions` are more of the measurement's own; `threads` are all of the machine's by default.
    """
    threads = usable_cores() if threads is None else threads
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "source": source_version(),
        "machine": describe_machine(),
        "conditions": {"threads": threads, "device": device, **conditions, **watch.finish()},
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
        """Return a meter for the first GPU that this process may see, or None without one."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, first_visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES", "0")))
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


def first_visible(nvml: Any, visible: str) -> Any:
    """Return NVML's handle of the first GPU that `CUDA_VISIBLE_DEVICES` names, by index, UUID or the UUID's beginning.

    NVML counts as CUDA does under `CUDA_DEVICE_ORDER=PCI_BUS_ID`. Raises `LookupError` when no GPU is named.
    """
    first = visible.partition(",")[0].strip()
    if first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):
        for handle in map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount())):
            if nvml.nvmlDeviceGetUUID(handle).startswith(first):
                return handle
    raise LookupError(f"CUDA_VISIBLE_DEVICES is {visible!r}: no GPU of that name")
