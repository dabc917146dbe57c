"""The process that plans are built in: it reads requests and writes answers, one JSON line each; see `child`.

Standard output carries answers alone: what a library prints there goes to standard error. The process ends as soon as
its standard input does, which also happens when its parent dies, whatever it is at.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..cuda.context import CudaContext
from ..errors import EngineError, LatentRTError, reason
from .builder import build_plan
from .library import load_library
from .plan import PlanOptions, profile_from_json

Answer = Callable[[Mapping[str, Any]], None]

log = logging.getLogger(__name__)


def main() -> None:
    """Serve requests, one after the other, until standard input ends."""
    answer = _answers()
    _leave_no_core()
    logging.getLogger("latentrt").addHandler(_Forward(answer))
    requests: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    while True:
        answer(serve(json.loads(requests.get()), answer))


def serve(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """Build the plan of a request and return the last answer to it: its facts, or the error that it ended with."""
    logging.getLogger("latentrt").setLevel(request["log_level"])
    try:
        return {"facts": _build(request, answer)}
    except LatentRTError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"error": "OSError", "errno": error.errno, "message": error.strerror or str(error)}
    except MemoryError:
        return {"error": "MemoryError", "message": ""}
    except Exception as error:  # a release of another shape than those we know
        log.debug("the build failed", exc_info=True)
        what = f"{request['backend']} {request['version']} failed to build {Path(request['graph']).name}"
        return {"error": "EngineError", "message": f"{what} ({type(error).__name__}: {reason(error)})"}


def _build(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    library = load_library(request["backend"])
    if library.version != request["version"]:
        raise EngineError(
            f"{request['backend']} {request['version']} was replaced by {library.version} while this program ran: "
            "start it again"
        )
    timing_cache, gpu = request["timing_cache"], request["gpu"]
    return build_plan(
        library,
        Path(request["graph"]),
        Path(request["output"]),
        profile_from_json(request["profile"]),
        PlanOptions(**request["options"]),
        compute_capability=request["compute_capability"],
        timing_cache=None if timing_cache is None else Path(timing_cache),
        progress=(lambda *step: answer({"progress": step})) if request["progress"] else None,
        activate=None if gpu is None else _context(gpu).activate,
    )


@cache
def _context(gpu: int) -> CudaContext:
    return CudaContext(gpu)


def _answers() -> Answer:
    """Return what writes an answer, from any thread, and keep everything else off standard output."""
    out, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)

    def answer(message: Mapping[str, Any]) -> None:
        try:
            with lock:
                out.write(json.dumps(message) + "\n")
                out.flush()
        except BrokenPipeError:  # nobody waits for this build any more
            os._exit(1)

    return answer


def _receive(requests: SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _leave_no_core() -> None:
    """Let a crash write no image of memory, of gigabytes, into whatever folder this is."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


class _Forward(logging.Handler):
    """Hands what is logged here to the parent's loggers."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def emit(self, record: logging.LogRecord) -> None:
        self._answer({"log": [record.name, record.levelno, self.format(record)]})
