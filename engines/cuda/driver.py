"""The CUDA driver: whether there is one, and its calls behind one funnel for error codes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ..errors import BackendUnavailableError, EngineError

_INIT_ERRORS = {
    34: "libcuda.so.1 is the toolkit's stub: put the driver's own library first on LD_LIBRARY_PATH",
    100: "the driver sees no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi",
    803: "the driver and its library have different versions: restart the machine after a driver update",
    804: "the GPU does not support this driver's forward-compatibility library: remove it or update the driver",
}


@functools.cache
def unavailable_reason() -> str | None:
    """Return why CUDA cannot be used in this process, or None; imports nothing and takes no time without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 is missing)"
    if status := library.cuInit(0):
        return _INIT_ERRORS.get(status, f"the NVIDIA driver does not start (cuInit gives error {status})")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed: run `pip install 'latentrt[gpu]'`"
    return None


def load_driver() -> Driver:
    """Return the driver of this machine, initialized; raises `BackendUnavailableError` when there is none."""
    if reason := unavailable_reason():
        raise BackendUnavailableError(f"CUDA: {reason}")
    driver = Driver(importlib.import_module("cuda.bindings.driver"))
    driver.cuInit(0)
    return driver


class Driver:
    """The functions of `cuda.bindings.driver`, each returning its value or raising `EngineError`.

    `driver.cuMemAlloc(n)` is the pointer itself; the status that the bindings return beside it has been checked. Names
    that are no functions (enumerations) come through as they are.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._module, name)
        if not name.startswith("cu"):
            return member
        call = functools.partial(self._call, name, member)
        setattr(self, name, call)  # the next look-up does not come here
        return call

    def _call(self, name: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status) != 0:
            raise self._error(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, name: str, status: Any) -> EngineError:
        code = str(getattr(status, "name", status))
        if code == "CUDA_ERROR_OUT_OF_MEMORY":
            _, free, total = self._module.cuMemGetInfo()
            return EngineError(
                f"the GPU is out of memory ({free / 2**20:.0f} of {total / 2**20:.0f} MiB are free): "
                "use a smaller size or batch, --low-memory, or stop other programs on this GPU"
            )
        sticky = code in ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_ASSERT")
        _, text = self._module.cuGetErrorString(status)
        hint = "; this process cannot use the GPU any more, start it again" if sticky else ""
        return EngineError(f"CUDA: {name} failed with {code} ({text.decode()}){hint}")
