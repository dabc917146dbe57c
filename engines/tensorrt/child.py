"""Plans built in a child process: a library that crashes takes it along, and not the program.

One build has one child. It waits some seconds for the next build, since starting takes half of one; then it ends,
and gives back what it holds. A build that fails, is interrupted or whose `progress` raises ends its child at once; a
child whose parent dies ends by itself. It runs in a session of its own, so Ctrl-C in a terminal reaches the parent
alone, with the environment and module path that the parent had when it started. It writes the plan and the timing
cache, and nothing else.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from .. import errors
from ..errors import NEEDS_LESS, EngineError, LatentRTError
from ..files import sweep
from ..progress import Progress
from .library import Library
from .plan import PlanOptions, Profile

IDLE = 5.0
"""Seconds that a child waits for the next build."""

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from latentrt.engines.tensorrt.worker import main; main()"
"""What a child runs. `-m` would put the folder that the user is in first, and find the user's modules there."""


def build_in_child(
    library: Library,
    graph: Path,
    output: Path,
    profile: Profile,
    options: PlanOptions,
    *,
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
    gpu: int | None = None,
) -> dict[str, Any]:
    """Build a plan as `build_plan` does, in a child, on a GPU where there is one.

    Raises what `build_plan` raises, and `EngineError` when the child ends without a word.
    """
    request = {
        "backend": library.backend,
        "version": library.version,
        "graph": str(graph.absolute()),
        "output": str(output.absolute()),
        "profile": profile.as_json(),
        "options": asdict(options),
        "compute_capability": compute_capability,
        "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
        "progress": progress is not None,
        "gpu": gpu,
        "log_level": logging.getLogger("latentrt").getEffectiveLevel(),
    }
    child = _take(library.backend, gpu)
    try:
        answer = child.ask(request, progress)
        if answer is None:
            raise _crashed(library, graph, child.close())
        if "error" in answer:
            raise _error(answer)
    except BaseException:
        child.close()
        if timing_cache is not None:
            with suppress(OSError):
                sweep(timing_cache)  # the child may have been writing it
        raise
    _keep(child)
    return dict(answer["facts"])


class Child:
    """A process that builds plans of one backend, on one GPU where there is one."""

    def __init__(self, backend: str, gpu: int | None) -> None:
        """Start it; raises `EngineError` where that cannot be done."""
        self.use = (backend, gpu)
        self.timer: threading.Timer | None = None
        self._answers: SimpleQueue[str] = SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                start_new_session=True,
            )
        except (OSError, TypeError) as error:  # no interpreter is known where Python is built into a program
            raise EngineError(
                f"the Python interpreter {sys.executable!r} cannot be started to build plans ({error}): "
                "build them with `latentrt build`"
            ) from error
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Tell whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], progress: Progress | None) -> dict[str, Any] | None:
        """Return the last answer to a request, or None when the process ends without one."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        while line := self._line():
            answer: dict[str, Any] = json.loads(line)
            if "log" in answer:
                name, level, message = answer["log"]
                logging.getLogger(name).log(level, "%s", message)
            elif "progress" not in answer:
                return answer
            elif progress is not None:
                progress(*answer["progress"])
        return None

    def _line(self) -> str:
        """Wait for a line; an interrupt may come as a note to Python alone, which a wait without end does not see."""
        while True:
            with suppress(Empty):
                return self._answers.get(timeout=0.1)

    def close(self) -> int:
        """End the process at once and return its exit code; calling it again does nothing else."""
        process = self._process
        try:
            process.kill()
            return process.wait()
        finally:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()


def _read(stream: IO[str], answers: SimpleQueue[str]) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put("")


def _crashed(library: Library, graph: Path, code: int) -> EngineError:
    what = f"while it built {graph.name}"
    if code == -getattr(signal, "SIGKILL", 9):
        return EngineError(
            f"{library.backend} {library.version} was killed {what}, as systems do when memory runs out: {NEEDS_LESS}"
        )
    how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return EngineError(
        f"{library.backend} {library.version} {how} {what}: use another backend or another version of it, and report it"
    )


def _error(answer: Mapping[str, Any]) -> BaseException:
    """Return the exception that an answer tells of."""
    name, message = answer["error"], answer["message"]
    if name == "OSError":
        return OSError(answer["errno"], message)
    if name == "MemoryError":
        return MemoryError()
    kind = getattr(errors, name)
    assert issubclass(kind, LatentRTError)
    error = kind.__new__(kind, message)  # its text is whole, whatever it is made from
    error.args = (message,)
    return error


_idle: list[Child] = []
_lock = threading.Lock()


def _take(backend: str, gpu: int | None) -> Child:
    """Return a child that waits for a build like this one, or a new one."""
    with _lock:
        for child in [each for each in _idle if each.use == (backend, gpu)]:
            _idle.remove(child)
            if child.timer is not None:
                child.timer.cancel()
            if child.is_alive():
                return child
            child.close()
    return Child(backend, gpu)


def _keep(child: Child) -> None:
    child.timer = timer = threading.Timer(IDLE, _end, [child])
    timer.daemon = True
    with _lock:
        _idle.append(child)
    timer.start()


def _end(child: Child) -> None:
    with _lock:
        if child in _idle:
            _idle.remove(child)
            child.close()


def end_all() -> None:
    """End every child that waits for a build."""
    for child in tuple(_idle):
        _end(child)


atexit.register(end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's
