"""The worker process: one contender, commanded with JSON lines on standard input, answering on standard output.

`prepare` opens the contender, `run` answers one request, the end of the input ends the process. Libraries that print
cannot disturb the answers: standard output is moved to standard error before any of them is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

from .process import peak_bytes, resident_bytes

MODULES = {
    "latentrt": "latentrt",
    "diffusers": "diffusers",
    "openvino": "openvino",
    "optimum": "optimum",
}
"""The module of a contender, by the first part of its name."""


class Contender(Protocol):
    """One way to answer a request; opened by its constructor `(variant, options)`."""

    facts: dict[str, Any]
    """Seconds of `import`, `open`, `build`; `versions`; `options` that shape its speed."""

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request; returns `stages`, `steps` and `total` in seconds."""

    def save(self, file: Path, *, latents: bool) -> None:
        """Write the last request's answer to an .npz file; see `process.Worker.run`."""


def main(arguments: list[str]) -> None:
    """Serve commands for the contender named on the command line until the input ends."""
    family, _, variant = arguments[0].partition("/")
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    contender: Contender | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "prepare":
                os.sched_setaffinity(0, command["cores"])
                module = importlib.import_module(f".{MODULES[family]}", __package__)
                contender = module.Contender(variant, command)
                reply = contender.facts
            else:
                assert contender is not None, "prepare comes first"
                _reset_peak()
                reply = contender.run(command["request"])
                if command["save"]:
                    contender.save(Path(command["save"]), latents=command["latents"])
            reply |= {"peak_bytes": peak_bytes(), "resident_bytes": resident_bytes()}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0]
            reply = {"error": f"{type(error).__name__}: {first}"}
        replies.write(json.dumps(reply) + "\n")


def _reset_peak() -> None:
    """Start a new high-water mark of resident memory; where the system has no such switch, the old one stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
