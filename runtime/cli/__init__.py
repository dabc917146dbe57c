"""The command line.

Every error is one line on standard error. Exit codes: 0 done, 1 failed, 2 bad usage or request, 130 interrupted. What
was typed wrong (a bundle that does not exist, an unknown backend or sampler) is 2; what went wrong on the machine (a
damaged file, a full disk, a backend that cannot run here) is 1.

This module imports nothing that takes time: an interrupt is handled before anything else is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import interrupts
from .interrupts import INTERRUPTED


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return its exit code."""
    try:
        from .app import execute

        return execute(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return _interrupted()


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        interrupts.watch()
        code = run()
        interrupts.stop()
    except KeyboardInterrupt:  # in the few lines that `run` does not guard
        code = _interrupted()
    sys.exit(code)


def _interrupted() -> int:
    interrupts.stop()
    interrupts.forget()
    sys.stderr.write("latentrt: error: interrupted\n")
    return INTERRUPTED
