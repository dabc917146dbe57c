"""What HTTP and the batcher cost one request on an idle server: `python -m latentrt.benchmarks.serving.overhead`.

The same request is made of the real server, in a process of its own, and of a pipeline in this one, in turns; both end
with a PNG, and have the same threads. The record is one line of JSON; `--keep` adds it to those of this machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from ...engines.errors import EngineError, LatentRTError
from ...export.embedded import ensure_bundle
from ...runtime import Pipeline
from ...runtime.pictures.png import encode_png
from ..measure import machine
from ..measure.statistics import summarize
from ..report.records import Record, append, default_file

WARM_UP = 5
ANSWER_SECONDS = 120.0


@contextmanager
def server(size: int, threads: int) -> Iterator[http.client.HTTPConnection]:
    """Run `latentrt serve` over the embedded model, and yield a connection to it."""
    command = [sys.executable, "-m", "latentrt.runtime", "serve", "--port", "0", "--size", f"{size}x{size}"]
    command += ["--backend", "onnxruntime-cpu", "--threads", str(threads), "--no-access-log"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if found := re.search(r"serving .* on http://([\d.]+):(\d+)", line):
                    with closing(http.client.HTTPConnection(found[1], int(found[2]), timeout=ANSWER_SECONDS)) as opened:
                        yield opened
                    return
            raise EngineError(f"the server did not start: try {shlex.join(command)}")
        finally:
            process.terminate()


def measure(size: int, steps: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Return the seconds of each request, of the server and of the pipeline in turns, and of an answer without work."""
    request: dict[str, Any] = {"prompt": "a red circle on a blue background", "num_inference_steps": steps, "seed": 1}
    body = json.dumps({**request, "size": f"{size}x{size}"})

    with (
        Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=threads) as pipe,
        server(size, threads) as connection,
    ):
        pipe.warm_up([(size, size)])

        def ask(method: str, path: str, body: str | None = None) -> None:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise EngineError(f"the server answered {answer.status}: {text[:200]!r}")

        calls: dict[str, Callable[[], object]] = {
            "pipeline": lambda: encode_png(pipe(**request, height=size, width=size).images[0]),
            "http": lambda: ask("POST", "/v1/images/generations", body),
            "health": lambda: ask("GET", "/health"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(WARM_UP + rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Measure and print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add the record to those of this machine")
    options = parser.parse_args()
    watch = machine.LoadWatch()
    try:
        seconds = measure(options.size, options.steps, options.rounds, options.threads)
    except LatentRTError as error:
        sys.exit(f"error: {error}")
    over = [one - other for one, other in zip(seconds["http"], seconds["pipeline"], strict=True)]
    command = f"python -m latentrt.benchmarks.serving.overhead {shlex.join(sys.argv[1:])}".strip()
    record: Record = {
        "kind": "overhead",
        **machine.stamp(watch, command, "cpu", options.threads),
        "work": {"size": options.size, "steps": options.steps, "bundle": "embedded"},
        "seconds": {name: summarize(values) for name, values in seconds.items()},
        "overhead_seconds": summarize(over),
    }
    if options.keep:
        append(default_file(record["machine"]), [record])
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
