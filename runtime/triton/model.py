"""A model of Triton's Python backend, copied into a model repository by `latentrt triton-repository`.

Triton loads this file by itself, outside of any package; what it does is in `latentrt.runtime.triton.serving`.
"""

import importlib
import site
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATHS = Path(__file__).with_name("python_path.txt")
"""Folders of packages, one a line, or no such file: the backend's process reads no PYTHONPATH."""
if PATHS.exists():
    for _folder in PATHS.read_text(encoding="utf-8").splitlines():
        site.addsitedir(_folder)


class TritonPythonModel:
    """The class that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and warm up; Triton says that it is ready afterwards."""
        backend = importlib.import_module("triton_python_backend_utils")  # needs numpy, which may be in those folders
        serving = importlib.import_module("latentrt.runtime.triton.serving")
        self._serving = serving.Serving(args, backend)

    def execute(self, requests: Sequence[Any]) -> None:
        """Queue requests and return at once: their responses are sent as they come."""
        self._serving.execute(requests)

    def finalize(self) -> None:
        """Let requests finish, then close everything."""
        self._serving.close()
