"""A server under load for a long time: its memory, files and threads stay what they were, and nothing is stuck.

The load is 80 % of what the server does on this machine at the start: unlike requests, streams, jobs that are cancelled
on their way, and clients that hang up. For so many seconds (900), and with a line of figures, whatever the end:

    LATENTRT_SOAK_SECONDS=900 pytest -m slow tests/soak/test_server.py
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2
import psutil
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LATENTRT_SOAK_SECONDS", "900"))
SHARE = 0.8
CLIENTS = 16
SERVE = ("--port", "0", "--size", "64x64", "--backend", "onnxruntime-cpu", "--threads", "1", "--max-waiting", "32")
STEPS = (4, 6, 8, 12, 20)
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m_karras", "unipc", "heun")


def body(choose: random.Random) -> dict[str, Any]:
    """Return an unlike request."""
    return {
        "prompt": choose.choice(("a red circle", "two green stars", "a small yellow cross on blue", "")),
        "size": "64x64",
        "seed": choose.randrange(2**32),
        "sampler": choose.choice(SAMPLERS),
        "num_inference_steps": choose.choice(STEPS),
        "guidance_scale": choose.choice((1.0, 3.0, 3.0, 3.0)),
        "n": choose.choice((1, 1, 1, 2)),
    }


class Load:
    """Requests of several kinds, and how each ended."""

    def __init__(self, url: str) -> None:
        """Send nothing yet."""
        self.http = httpx2.Client(base_url=url, timeout=120, verify=False, limits=httpx2.Limits(max_connections=None))
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    def ask(self, kind: str, choose: random.Random) -> None:
        """Send one request, and note its end."""
        try:
            self.ends[getattr(self, f"_{kind}")(body(choose))] += 1
        except Exception as error:
            self.wrong.append(f"{kind}: {error!r}")

    def _plain(self, given: dict[str, Any]) -> str:
        answer = self.http.post("/v1/images/generations", json=given)
        if answer.status_code == 429:
            return "refused"
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == given["n"]
        return "drawn"

    def _stream(self, given: dict[str, Any]) -> str:
        more = {**given, "stream": True, "partial_images": 1}
        with self.http.stream("POST", "/v1/images/generations", json=more) as answer:
            if answer.status_code == 429:
                return "refused"
            assert answer.status_code == 200
            text = answer.read().decode()
        assert text.count("event: image_generation.completed") == given["n"], text[-300:]
        return "streamed"

    def _gone(self, given: dict[str, Any]) -> str:
        with suppress(httpx2.TimeoutException):
            answer = self.http.post("/v1/images/generations", json={**given, "num_inference_steps": 60}, timeout=0.05)
            assert answer.status_code in (200, 429), answer.text
        return "hung up"

    def _job(self, given: dict[str, Any]) -> str:
        answer = self.http.post("/v1/jobs", json={**given, "num_inference_steps": 60})
        if answer.status_code == 429:
            return "refused"
        assert answer.status_code == 202, answer.text
        where = f"/v1/jobs/{answer.json()['id']}"
        time.sleep(0.1)
        assert self.http.post(f"{where}/cancel").status_code == 200
        while (state := self.http.get(where).json()["state"]) not in ("cancelled", "succeeded"):
            assert state in ("queued", "running"), state
            time.sleep(0.05)
        assert self.http.delete(where).status_code < 300
        return "cancelled"


def value(http: httpx2.Client, name: str) -> float:
    """Return a metric's sum over its labels."""
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return sum(map(float, found))


def held(load: Load) -> dict[str, float]:
    """Return what is in flight: images that wait, images in slots, requests."""
    return {
        name: value(load.http, f"latentrt_{name}") for name in ("queue_images", "running_images", "jobs_unfinished")
    }


def at_rest(load: Load, server: psutil.Process) -> tuple[int, int]:
    """Return the numbers of files beside connections and of threads, once nothing is in flight or after two minutes."""
    end = time.monotonic() + 120
    while any(held(load).values()) and time.monotonic() < end:
        time.sleep(0.2)
    return server.num_fds() - int(value(load.http, "latentrt_connections")), server.num_threads()


def mib(nbytes: float) -> float:
    return round(nbytes / 2**20, 1)


def pace(load: Load) -> float:
    """Return how many requests a second the server does when it always has some."""
    began, count, choose = time.monotonic(), 60, random.Random(1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: load.ask("plain", choose), range(count)))
    return count / (time.monotonic() - began)


def test_nothing_grows_and_nothing_is_stuck(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "latentrt.runtime", "serve", *SERVE]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    load = None
    assert child.stderr is not None
    try:
        url = next(found[0] for line in child.stderr if (found := re.search(r"http://[\d.:]+", line)))
        threading.Thread(target=child.stderr.read, daemon=True).start()
        load, server = Load(url), psutil.Process(child.pid)
        while load.http.get("/v2/health/ready").status_code != 200:
            time.sleep(0.1)
        rate = SHARE * pace(load)
        choose, memory, began = random.Random(2), list[tuple[float, int]](), time.monotonic()
        kinds = ("plain",) * 6 + ("stream", "stream", "gone", "job")
        with ThreadPoolExecutor(CLIENTS) as pool:
            following, rest = began, (0, 0)
            while (now := time.monotonic()) < began + SECONDS:
                memory.append((now - began, server.memory_info().rss))
                pool.submit(load.ask, choose.choice(kinds), random.Random(choose.randrange(2**32)))
                if rest == (0, 0) and now > began + SECONDS / 5:
                    rest = at_rest(load, server)
                following = max(following, time.monotonic() - 1) + choose.expovariate(rate)
                time.sleep(max(0.0, following - time.monotonic()))
        after = at_rest(load, server)
        sizes = {
            part: statistics.median(size for when, size in memory if part <= when / SECONDS * 5 < part + 1)
            for part in (1, 4)
        }
        left = held(load)
        figures = {
            "seconds": SECONDS,
            "requests_a_second": round(rate, 2),
            "ends": dict(load.ends),
            "errors": len(load.wrong),
            "resident_mib": {
                "start": mib(memory[0][1]),
                "second_fifth": mib(sizes[1]),
                "last_fifth": mib(sizes[4]),
                "end": mib(server.memory_info().rss),
            },
            "files": [rest[0], after[0]],  # without connections, as a fifth was over and at the end
            "threads": [rest[1], after[1]],
            "left": left,
        }
        with capsys.disabled():
            sys.stdout.write(f"\n{json.dumps(figures)}\n")
        assert load.wrong == []
        assert not any(left.values()), "something is stuck"
        assert all(load.ends[end] for end in ("drawn", "streamed", "hung up", "cancelled"))
        assert sizes[4] <= 1.02 * sizes[1]
        assert after[0] <= rest[0] + 2 and after[1] <= rest[1] + 2  # threads of pools come as they are needed
        child.terminate()
        assert child.wait(60) == 0
    finally:
        if load is not None:
            load.http.close()
        child.kill()
        child.wait()
        child.stderr.close()
