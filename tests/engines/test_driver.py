"""What is said of drivers and bindings that do not fit, and that nothing but our own errors comes out of a call."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from latentrt.engines.cuda import driver
from latentrt.engines.cuda.driver import Driver, load_driver
from latentrt.engines.errors import BackendUnavailableError, EngineError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Return what asks for the reason with a driver and bindings of given versions."""

    def ask(version: int, bindings: str, status: int = 0) -> str | None:
        def tell(pointer: object) -> int:
            pointer._obj.value = version  # type: ignore[attr-defined]
            return status

        library = SimpleNamespace(cuInit=lambda flags: 0, cuDriverGetVersion=tell)
        monkeypatch.setattr(driver, "_library", lambda: library)
        monkeypatch.setattr(driver, "module_exists", lambda name: True)
        monkeypatch.setattr(driver, "_bindings_version", lambda: bindings)
        return driver.unavailable_reason.__wrapped__()

    return ask


@pytest.mark.parametrize("bindings", ["13.0.0", "13.5.0", "14.1"])
@pytest.mark.parametrize(("version", "text"), [(12020, "12.2"), (12060, "12.6"), (12070, "12.7")])
def test_a_driver_too_old_for_the_bindings_is_one_line_with_the_command(
    installed: Callable[..., str | None], version: int, text: str, bindings: str
) -> None:
    reason = installed(version, bindings)
    major = bindings.split(".")[0]
    assert reason is not None
    assert reason.startswith(f"the driver supports CUDA {text} and cuda-bindings {major}.x needs 12.8: ")
    assert "pip install 'cuda-bindings<13'" in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("version", "bindings"), [(12080, "13.0.0"), (13000, "13.5.0"), (12020, "12.9.2"), (12020, ""), (12020, "unknown")]
)
def test_a_driver_that_fits_is_taken(installed: Callable[..., str | None], version: int, bindings: str) -> None:
    assert installed(version, bindings) is None


def test_a_driver_without_a_version_says_so(installed: Callable[..., str | None]) -> None:
    assert "does not tell its version" in str(installed(0, "13.0.0", status=3))


def test_what_the_bindings_raise_is_ours() -> None:
    def missing(*arguments: object) -> tuple[int]:
        raise RuntimeError("Function cuEventElapsedTime_v2 not found\nand more")

    old = Driver(SimpleNamespace(cuEventElapsedTime=missing))
    with pytest.raises(EngineError, match=r"cuEventElapsedTime cannot be called \(Function .* not found\): the driver"):
        old.cuEventElapsedTime(1, 2)
    with pytest.raises(EngineError, match="the installed cuda-bindings have no cuGraphUpload"):
        old.cuGraphUpload(1, 2)


def test_bindings_that_cannot_be_imported_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise RuntimeError("no library\nat all")

    monkeypatch.setattr(driver, "unavailable_reason", lambda: None)
    monkeypatch.setattr(driver.importlib, "import_module", broken)
    with pytest.raises(BackendUnavailableError, match=r"cuda-bindings cannot be imported \(no library\)$"):
        load_driver()


def test_a_module_is_looked_for_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.module_exists("json.decoder")
    assert not driver.module_exists("no_such.module") and not driver.module_exists("sys.nothing")
    monkeypatch.setitem(sys.modules, "half_loaded", SimpleNamespace(__spec__=None))  # type: ignore[arg-type]
    assert not driver.module_exists("half_loaded")


def test_windows_has_its_own_name_for_the_driver() -> None:
    code = """
import ctypes, sys
import latentrt.engines.errors
sys.platform = "win32"
asked = []
def load(name):
    asked.append(name)
    raise OSError
ctypes.CDLL = load
from latentrt.engines.cuda import driver
assert "nvcuda.dll is missing" in driver.unavailable_reason() and asked == ["nvcuda.dll"], asked
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ctypes.CDLL is not None


def test_nothing_that_posix_alone_has_is_needed_to_import_the_engines() -> None:
    code = """
import importlib, os, pkgutil, sys
for name in ("sysconf", "sched_getaffinity", "pread", "getuid", "geteuid", "fork", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import latentrt.engines
for module in pkgutil.walk_packages(latentrt.engines.__path__, "latentrt.engines."):
    importlib.import_module(module.name)
from latentrt.engines.host import HostDevice
from latentrt.engines.machine import usable_cores
assert usable_cores() >= 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
