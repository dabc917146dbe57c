"""The CUDA driver: whether there is one, and its calls behind one funnel for error codes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import BackendUnavailableError, EngineError, reason

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_INIT_ERRORS = {
    34: f"{LIBRARY} is the toolkit's stub: put the driver's own library first on LD_LIBRARY_PATH",
    100: "the driver sees no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi",
    803: "the driver and its library have different versions: restart the machine after a driver update",
    804: "the GPU does not support this driver's forward-compatibility library: remove it or update the driver",
}


_OLDEST_DRIVER = {13: 12080}
"""The oldest CUDA of a driver that has every function we call, by the first major version of cuda-bindings."""


def has_driver() -> bool:
    """Tell whether an NVIDIA driver is installed, whether or not it works."""
    return _library() is not None


@functools.cache
def unavailable_reason() -> str | None:
    """Return why CUDA cannot be used in this process, or None; imports nothing and takes no time without a driver."""
    library = _library()
    if library is None:
        return f"no NVIDIA driver is installed ({LIBRARY} is missing)"
    if status := library.cuInit(0):
        return _INIT_ERRORS.get(status, f"the NVIDIA driver does not start (cuInit gives error {status})")
    if not module_exists("cuda.bindings"):
        return "cuda-bindings is not installed: run `pip install 'latentrt[gpu]'`"
    supported = ctypes.c_int()
    if status := library.cuDriverGetVersion(ctypes.byref(supported)):
        return f"the NVIDIA driver does not tell its version (cuDriverGetVersion gives error {status})"
    return _mismatch(supported.value, _bindings_version())


def module_exists(name: str) -> bool:
    """Tell whether a module can be found, importing at most the packages around it; never raises."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # a package around it that is missing, broken, or no package
        return False


def cuda_version(number: int) -> str:
    """Return a version as NVIDIA writes it, from the number that the driver gives: 12080 is `12.8`."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def _bindings_version() -> str:
    try:
        return version("cuda-bindings")
    except PackageNotFoundError:  # installed in another way: what it lacks is said at the call
        return ""


def _mismatch(driver: int, bindings: str) -> str | None:
    """Return why the installed cuda-bindings cannot be used with a driver, or None."""
    major = bindings.partition(".")[0]
    if not major.isdecimal():
        return None
    oldest = max((needs for first, needs in _OLDEST_DRIVER.items() if first <= int(major)), default=0)
    if driver >= oldest:
        return None
    return (
        f"the driver supports CUDA {cuda_version(driver)} and cuda-bindings {major}.x needs {cuda_version(oldest)}: "
        f"run `pip install 'cuda-bindings<{min(_OLDEST_DRIVER)}'` or update the driver"
    )


def load_driver() -> Driver:
    """Return the driver of this machine, initialized; raises `BackendUnavailableError` when there is none."""
    if why := unavailable_reason():
        raise BackendUnavailableError(f"CUDA: {why}")
    try:
        driver = Driver(importlib.import_module("cuda.bindings.driver"))
    except Exception as error:  # whatever a broken installation raises
        raise BackendUnavailableError(f"CUDA: cuda-bindings cannot be imported ({reason(error)})") from error
    driver.cuInit(0)
    return driver


class Driver:
    """The functions of `cuda.bindings.driver`, each returning its value or raising `EngineError`.

    `driver.cuMemAlloc(n)` is the pointer itself; the status that the bindings return beside it has been checked. Names
    that are no functions (enumerations) come through as they are.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    @property
    def identity(self) -> int:
        """What tells one driver from another in this process."""
        return id(self._module)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._module, name, None)
        if member is None:
            raise EngineError(f"CUDA: the installed cuda-bindings have no {name}: install another version of them")
        if not name.startswith("cu"):
            return member
        call = functools.partial(self._call, name, member)
        setattr(self, name, call)  # the next look-up does not come here
        return call

    def _call(self, name: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        try:
            status, *values = function(*arguments)
        except RuntimeError as error:  # the driver lacks the function, or its library cannot be loaded
            raise EngineError(
                f"CUDA: {name} cannot be called ({reason(error)}): the driver is too old for the installed "
                "cuda-bindings, update it or install older ones"
            ) from error
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
