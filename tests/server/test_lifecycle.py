"""From the first moment to the last: the command line, loading, draining, hung steps, engines that keep failing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.cli import run
from latentrt.runtime.server import HttpSettings, Metrics, create_app, lifecycle
from latentrt.runtime.service import Models, ModelSettings, Service
from latentrt.runtime.service.models import Model

from .conftest import Served, error_of, generate, held, opening_held, until

SMALL = ("--size", "64x64", "--backend", "onnxruntime-cpu", "--threads", "1", "--slots", "2")


@contextmanager
def process(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run `latentrt serve`, and yield the process, its URL and the lines of its log."""
    command = [sys.executable, "-m", "latentrt.runtime", "serve", "--port", "0", *SMALL, *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    lines: list[str] = []
    assert child.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(child.stderr or ()), daemon=True)
    reader.start()
    try:
        until(lambda: child.poll() is not None or any("serving" in line for line in lines))
        found = re.search(r"http://[\d.:]+", "".join(lines))
        assert found, "".join(lines)
        yield child, found[0], lines
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stderr.close()


def test_a_signal_lets_what_was_taken_finish(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the tests\nsecret-key\n")
    options = ("--api-key-file", str(keys), "--log-json")
    with process(*options, LATENTRT_SERVE_MAX_IMAGES="3") as (child, url, lines), ThreadPoolExecutor() as pool:
        key = {"authorization": "Bearer secret-key", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        with httpx2.Client(base_url=url, headers=key, timeout=60, verify=False) as http:
            too_many = generate(http, n=4)
            assert too_many.status_code == 400 and "at most 3" in error_of(too_many)["message"]
            body = {"prompt": "a secret castle", "size": "64x64", "num_inference_steps": 100, "n": 3, "stream": True}
            with http.stream("POST", "/v1/images/generations", json=body) as stream:
                whole = pool.submit(generate, http, num_inference_steps=100)
                until(lambda: http.get("/metrics").text.count("latentrt_jobs_unfinished 2.0"))
                child.send_signal(signal.SIGTERM)
                until(lambda: http.get("/health").status_code == 503)
                assert error_of(generate(http))["code"] == "draining"
                events = [line for line in stream.iter_lines() if line.startswith("event: ")]
            assert events == ["event: image_generation.completed"] * 3 and whole.result().status_code == 200
        assert child.wait(30) == 0
    said = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in said)
    request = next(line for line in said if line.get("status") == 400)
    assert request["route"] == "/v1/images/generations" and request["request_id"] == too_many.headers["x-request-id"]
    assert request["trace_id"] == "ab" * 16 and request["parent_id"] == "cd" * 8
    assert too_many.headers["traceparent"] == f"00-{'ab' * 16}-{request['span_id']}-01"
    assert "castle" not in "".join(lines)


@pytest.mark.long
def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    with process() as (child, url, _), httpx2.Client(base_url=url, timeout=60, verify=False) as http:
        stderr = child.stderr
        assert stderr is not None
        os.dup2(os.open(os.devnull, os.O_RDONLY), stderr.fileno())  # closes this end of the pipe
        assert generate(http).status_code == 200
        child.terminate()
        assert child.wait(30) == 0


@pytest.mark.long
def test_an_interrupt_ends_it_and_a_second_one_at_once() -> None:
    with process() as (child, url, _), httpx2.Client(base_url=url, timeout=60, verify=False) as http:
        job = http.post("/v1/jobs", json={"prompt": "x", "size": "128x128", "num_inference_steps": 150, "n": 10}).json()
        assert job["state"] in ("queued", "running")
        child.send_signal(signal.SIGINT)
        until(lambda: http.get("/health").status_code == 503)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "65535"),
        (["--host", "256.1.1.1"], "cannot be listened to"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--size", "65x64"], "multiple of 8"),
        (["--slots", "0"], ">= *1|greater than or equal to 1"),
        (["--backend", "nothing"], "choose auto"),
        (["--alias", "a"], "NAME=MODEL"),
        (["--alias", "a=b"], "of no bundle"),
        (["--alias", "a=embedded", "--alias", "a=b"], "for embedded and for b"),
        (["--api-key-file", "/nowhere"], "one key a line"),
        (["--max-body", "many"], "max-body"),
        (["--max-wait", "0"], "max_wait is 0"),
        (["--rows", "2", "--slots", "3"], "3 slots need 3"),
        (["--body-timeout", "0"], "--body-timeout is 0"),
        (["--timeout", "0"], "timeout"),
        (["--timeout", "inf"], "timeout is inf"),
        (["--timeout", "1e300"], "timeout is 1e"),
        (["--max-work", "inf"], "work is inf"),
        (["--max-work", "nan"], "work is nan"),
        (["--drain-timeout", "inf"], "--drain-timeout is inf"),
        (["--drain-timeout", "nan"], "drain-timeout.*nan"),
        (["--step-timeout", "0"], "--step-timeout is 0"),
        (["--step-timeout", "-1"], "--step-timeout is -1"),
        (["--step-timeout", "inf"], "--step-timeout is inf"),
        (["--step-timeout", "nan"], "--step-timeout is nan"),
        (["--results-ttl", "nan"], "results-ttl.* is nan"),
        (["--results-ttl", "-1"], "results-ttl.* is -1"),
        (["--results-ttl", "inf"], "results-ttl.* is inf"),
        (["--results-memory", "0"], "results-memory.* is 0"),
        (["--body-timeout", "inf"], "--body-timeout is inf"),
        (["--send-timeout", "nan"], "--send-timeout is nan"),
        (["--max-body", "0"], "--max-body is 0"),
        (["--max-wait", "nan"], "max_wait is nan"),
        (["--models-budget", "0"], "more than all may have"),
        (["--models-budget", "1KB"], "more than all may have"),
        (["no-such-bundle"], "does not exist"),
    ],
)
def test_bad_usage_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", *SMALL, *options]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("latentrt: error: ") and "\n" not in printed and re.search(said, printed), printed


@pytest.mark.parametrize("keys", [",", " ", " , ,"])
def test_a_variable_without_a_key_opens_no_server(
    keys: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTRT_SERVE_API_KEY", keys)
    assert run(["serve", *SMALL, "--host", "256.1.1.1"]) == 2
    assert "LATENTRT_SERVE_API_KEY is set, and holds no key" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert run(["serve", "--port", port, *SMALL]) == 2
    assert f"--port {port} on --host 127.0.0.1 cannot be listened to" in capsys.readouterr().err


def test_every_option_has_an_environment_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (?:-\w, )?--([a-z-]+)", text, re.MULTILINE)
    squeezed = re.sub(r"\s+", "", text)
    missing = [o for o in options if f"LATENTRT_SERVE_{o.replace('-', '_').upper()}" not in squeezed]
    assert len(options) > 30 and missing == ["help"]


class Life:
    """`lifecycle.serve` on a thread; a context manager."""

    def __init__(self, *names: str, **settings: Any) -> None:
        models = {name: Bundle.open(ensure_bundle()) for name in names or ("embedded",)}
        given = ModelSettings("onnxruntime-cpu", {"threads": 1}, slots=2, sizes=((64, 64),))
        self.metrics = Metrics()
        self.service = Service(Models(models, given, observer=self.metrics))
        self.server: lifecycle.Server | None = None
        self.error: BaseException | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.settings = lifecycle.LifeSettings(port=port, **settings)
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        http, startup = HttpSettings(), lifecycle.Server.startup

        async def noted(server: lifecycle.Server, sockets: Any = None) -> None:
            self.server = server
            await startup(server, sockets)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lifecycle.Server, "startup", noted)
            patch.setattr(lifecycle, "LOOK_SECONDS", 0.02)
            try:
                lifecycle.serve(create_app(self.service, http), self.service, self.settings, http, self.metrics)
            except BaseException as error:
                self.error = error

    def __enter__(self) -> Life:
        self.thread.start()
        until(lambda: self.service.state != "loading" or not self.thread.is_alive())
        return self

    def __exit__(self, *_: Any) -> None:
        if self.server is not None:
            self.server.drain()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.http.close()


def test_a_step_that_hangs_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with Life(step_timeout=0.3) as life:
        with held() as free:
            answer = generate(life.http)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "failed")
            assert life.http.get("/v2/health/live").status_code == 503
            assert error_of(generate(life.http))["code"] == "failed"
            until(lambda: codes)
            free.set()
        assert set(codes) == {lifecycle.HUNG} != {0}


def test_engines_that_keep_failing_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(slots: Slots, bucket: int) -> None:
        raise EngineError("the device had enough")

    with Life(max_failures=2) as life:
        monkeypatch.setattr(Slots, "step", fails)
        assert error_of(generate(life.http))["code"] == "engine_error"
        with suppress(httpx2.TransportError):  # it may be gone already
            generate(life.http)
        life.thread.join(60)
        assert isinstance(life.error, EngineError) and "keep failing" in str(life.error)


def test_a_bundle_that_cannot_be_opened_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RequestError("no such thing")

    monkeypatch.setattr(Model, "open", fails)
    with Life() as life:
        life.thread.join(60)
        assert isinstance(life.error, RequestError)


def test_a_signal_while_bundles_are_opened_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "warm_up", lambda *_: None)
    life = Life("one", "two")
    with opening_held() as free:
        life.thread.start()
        server = until(lambda: life.server)
        until(lambda: server.started)
        assert free.reached.wait(60)
        server.drain()
        until(lambda: server.should_exit)
        until(lambda: any(thread.name == "latentrt close" for thread in threading.enumerate()))
        free.set()
        life.thread.join(60)
    assert not life.thread.is_alive() and life.error is None
    assert [model.state for model in life.service.models] == ["cold", "cold"]
    life.http.close()


def test_what_is_not_done_in_time_is_dropped() -> None:
    with Life(drain_timeout=0.2) as life, held(), ThreadPoolExecutor() as pool:
        answer = pool.submit(generate, life.http)
        until(lambda: life.service.unfinished)
        began = time.monotonic()
        assert life.server is not None
        life.server.drain()
        assert error_of(answer.result())["code"] == "draining" and time.monotonic() - began > 0.2
    assert life.error is None


def test_engines_that_do_not_close_hold_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    close, free = Service.close, threading.Event()

    def slow(service: Service) -> None:
        assert free.wait(60)
        close(service)

    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(Service, "close", slow)
    with Life():
        pass
    assert codes == [0]
    free.set()
    until(lambda: not any(thread.name == "latentrt close" for thread in threading.enumerate()))


def test_a_server_that_is_closed_leaves_no_thread() -> None:
    def started() -> list[str]:
        return [each.name for each in threading.enumerate() if each not in before and each.name.startswith("latentrt")]

    before = set(threading.enumerate())
    with Served() as served, served.http() as http:
        assert generate(http).status_code == 200
        assert any(name.startswith("latentrt requests") for name in started())
    until(lambda: not started())
