"""What is said on standard error while work is done: log lines, one progress bar, or a plain line a stage."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ...engines.progress import Progress, silent, terminal_bar

PATIENCE = 5.0
"""Seconds of work before its stages are said where there is no terminal."""

log = logging.getLogger("latentrt")


class _Echo(logging.Handler):
    """Writes to whatever standard error is at that moment: a progress bar stands below it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            typer.echo(self.format(record), err=True)
        except Exception:  # nobody reads it any more: what is logged must not end what is done
            self.handleError(record)


def set_verbosity(verbose: int = 0, quiet: bool = False) -> None:
    """Say errors only, or warnings, or (verbose 1) what is done, or (2) everything that latentrt logs."""
    logging.basicConfig(format="latentrt: %(message)s", handlers=[_Echo()])
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.WARNING)
    log.setLevel(logging.ERROR if quiet else [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)])


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Yield a function `(stage, done, total)` that shows how far the work is, until the block ends.

    A terminal gets a bar. Anything else gets a line for each stage, once the work has lasted `PATIENCE` seconds.
    """
    if not log.isEnabledFor(logging.WARNING):
        yield silent
    elif sys.stderr.isatty():
        with terminal_bar(what) as update:
            yield update
    else:
        lines = _Lines(what)
        try:
            yield lines
        finally:
            lines.close()


class _Lines:
    """A `Progress` that says each stage once, in a line of its own."""

    def __init__(self, what: str) -> None:
        self._what, self._stage, self._late = what, "", False
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            self._stage = stage
            if self._late:
                self._say()

    def close(self) -> None:
        """Say nothing more."""
        self._timer.cancel()
        self._timer.join()

    def _begin(self) -> None:
        with self._lock:
            self._late = True
            self._say()

    def _say(self) -> None:
        if self._stage not in self._said:
            self._said.add(self._stage)
            typer.echo(f"latentrt: {self._what}: {self._stage}" if self._stage else f"latentrt: {self._what}", err=True)
