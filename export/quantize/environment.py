"""Model Optimizer in an environment of its own: it wants older packages than latentrt, and never runs in this process.

<home>/model-optimizer/<key>   a virtual environment with the packages below; it appears in one rename
<home>/model-optimizer/*.log   what a program said that failed

Both are refused where others may have written them, as engines are: what is in them is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ...engines.cache import home
from ...engines.errors import ExportError, RequestError, StorageError
from ...engines.files import locked, storage_error, sweep, temporary_beside
from ...engines.progress import Progress
from ...engines.trust import check_trusted

PACKAGES = (
    *("nvidia-modelopt==0.47.0", "onnx==1.21.0", "onnxruntime==1.24.4", "onnx-graphsurgeon==0.6.1"),
    *("onnxconverter-common==1.16.0", "onnxscript==0.7.2", "onnx-ir==1.1.0", "onnxslim==0.1.98", "polygraphy==0.53.6"),
    *("cppimport==26.4.17", "lief==1.0.0", "ml_dtypes==0.6.0", "numpy==2.4.6", "nvidia-ml-py==13.615.71"),
    *("omegaconf==2.4.0", "packaging==26.4", "protobuf==7.36.2", "PyYAML==6.0.4", "regex==2026.11.19"),
    *("rich==15.0.0", "scipy==1.17.1", "sympy==1.14.0", "tqdm==4.70.1", "typing_extensions==4.16.0"),
    *("colorama==0.4.6", "flatbuffers==25.12.19", "mpmath==1.3.0", "Pygments==2.21.0", "markdown-it-py==4.3.0"),
    *("mdurl==0.1.2", "safetensors==0.8.0", "pydantic==2.14.4", "pydantic_core==2.50.5", "annotated-types==0.8.0"),
    *("typing-inspection==0.4.5", "setuptools==80.9.0", "filelock==4.3.1", "Mako==1.4.3", "MarkupSafe==3.0.4"),
    *("pybind11==3.1.0", "ninja==1.13.2", "PuLP==3.3.2"),
)
"""All that its ONNX path imports, and nothing for GPUs: installed without what else the packages ask for."""

TORCH = "torch==2.13.0"
"""It imports PyTorch for a cast: that of this environment is used where there is one."""

IMPORT = "import modelopt.onnx.quantization"


def environment(progress: Progress) -> Path:
    """Return the Python of Model Optimizer's environment, which is made when there is none.

    Raises `ExportError` when pip fails, and `StorageError` where the folder cannot be written, or others may.
    """
    root = _root()
    shared = importlib.util.find_spec("torch")
    torch = None if shared is None or shared.origin is None else str(Path(shared.origin).parent.parent)
    key = hashlib.sha256(json.dumps([PACKAGES, TORCH, torch, sys.version, sys.prefix]).encode()).hexdigest()[:16]
    folder = root / key
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        with locked(root / f"{key}.lock"):
            if not folder.exists():
                sweep(folder)
                with temporary_beside(folder, folder=True) as temporary:
                    inside = temporary / python.relative_to(folder)
                    _make(temporary, inside, torch, progress)
                    temporary.rename(folder)
            check_trusted(root, folder)  # others know its name as well, and its folders are all its own
    except OSError as error:
        raise error if isinstance(error, StorageError) else storage_error(folder, error) from error
    return python


def _make(folder: Path, python: Path, torch: str | None, progress: Progress) -> None:
    progress("making an environment for Model Optimizer", 0, 2)
    run([sys.executable, "-m", "venv", str(folder)], "python -m venv")
    install = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar=off"]
    progress("installing Model Optimizer", 1, 2)
    run([*install, "--no-deps", *PACKAGES], "pip")
    if torch is None:
        run([*install, TORCH], "pip")
    else:
        _share(python, torch)
    run([str(python), "-c", IMPORT], "importing Model Optimizer")


def _share(python: Path, folder: str) -> None:
    """Let an environment find what it lacks in a folder of packages."""
    (packages,) = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "Python")
    Path(packages, "torch_of_latentrt.pth").write_text(f"{folder}\n", encoding="utf-8")


def checked(python: Path) -> Path:
    """Return a Python that imports Model Optimizer; raises `RequestError` for others, before hours are spent."""
    try:
        run([str(python), "-c", IMPORT], f"importing Model Optimizer with {python}")
    except ExportError as error:
        raise RequestError(f"{error}; give a Python with nvidia-modelopt[onnx]") from error
    return python


def run(command: Sequence[str], what: str) -> list[str]:
    """Run a program to its end and return the lines that it said, on either stream.

    It gets no terminal: Ctrl-C reaches this process alone, which ends the program. What it writes is for this user
    alone. When it fails, what it said stays in a file and `ExportError` names its last line; `RequestError` says that
    there is no such program.
    """
    log = _root() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        with log.open("wb") as file:
            code = _wait(command, file)
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise storage_error(log, error) from error
    except BaseException:
        log.unlink(missing_ok=True)
        raise
    if code:
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise ExportError(f"{what} failed ({_ending(code)}): {last}; all that it said is in {log}")
    log.unlink()
    return said


def _wait(command: Sequence[str], said: IO[bytes]) -> int:
    """Run a program and return its exit code; it ends when this is interrupted, with all that it has started.

    An interrupt comes to the main thread. The program is started in another one, so that there is none without a name.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, **streams, env=environment, start_new_session=True, umask=0o077))

    try:
        with ThreadPoolExecutor(1) as starter:
            starter.submit(start).result()
        return started[0].wait()
    except OSError as error:
        raise RequestError(
            f"{command[0]} cannot be run ({error.strerror or error}): give a Python with nvidia-modelopt"
        ) from error
    except BaseException:
        for process in started:
            if os.name == "nt":
                process.kill()
            else:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by signal {-code}"


def _root() -> Path:
    """Return the folder of all this, made for this user alone; raises `StorageError` where others may write to it."""
    root = home() / "model-optimizer"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(root, error) from error
    check_trusted(root)
    return root
