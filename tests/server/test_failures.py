"""What fails while a request is on its way: each in OpenAI's shape, harming nobody else."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.engines.errors import EngineError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.server import HttpSettings, sse
from latentrt.runtime.service import Ended, Event, Job, Limits, Service, Stepped, Work

from .conftest import Served, error_of, generate, held, picture, until


def batcher_of(served: Served) -> Any:
    return next(iter(served.service.models)).batcher


def assert_well(served: Served) -> None:
    """Nothing is left of what failed, and the next request is served."""
    until(lambda: not served.service.unfinished)
    until(lambda: (batcher_of(served).waiting, batcher_of(served).running) == (0, 0))
    with served.http() as http:
        assert generate(http).status_code == 200


@pytest.fixture
def steps_that_fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many of the next steps fail."""
    left, step = [0], Slots.step

    def failing(slots: Slots, bucket: int) -> None:
        if left[0]:
            left[0] -= 1
            raise EngineError("the device had enough")
        step(slots, bucket)

    monkeypatch.setattr(Slots, "step", failing)
    yield left


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> str:
    """A prompt whose conditioning is no number."""
    conditioning, text = Encoder.conditioning, "a prompt that is poison"
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as pipe:
        marked = pipe._batches.tokens(text)["token_ids"]

    def poisoned(encoder: Encoder, inputs: dict[str, Array]) -> dict[str, Array]:
        found = conditioning(encoder, inputs)
        if (inputs["token_ids"][-1] == marked[-1]).all():
            found = {name: np.full_like(array, np.nan) for name, array in found.items()}
        return found

    monkeypatch.setattr(Encoder, "conditioning", poisoned)
    return text


def test_numbers_that_are_none_fail_their_own_request(served: Served, poison: str) -> None:
    with served.http() as http, ThreadPoolExecutor(3) as pool:
        expected = generate(http).json()["data"][0]["b64_json"]
        asked = [pool.submit(generate, http, prompt=prompt) for prompt in (poison, "a red circle", "a red circle")]
        bad, *good = [each.result() for each in asked]
        assert (bad.status_code, error_of(bad)["code"]) == (500, "nan_output")
        assert bad.headers["x-should-retry"] == "false"
        assert [each.json()["data"][0]["seed"] for each in good] == [7, 7] and expected
    assert_well(served)


def test_an_engine_that_fails_once_is_not_noticed(served: Served, steps_that_fail: list[int]) -> None:
    with served.http() as http:
        steps_that_fail[0] = 1
        assert generate(http).status_code == 200
        assert steps_that_fail[0] == 0


def test_an_engine_that_keeps_failing(served: Served, steps_that_fail: list[int]) -> None:
    with served.http() as http:
        steps_that_fail[0] = 1000
        answer = generate(http)
        assert (answer.status_code, error_of(answer)["code"], error_of(answer)["type"]) == (
            500,
            "engine_error",
            "server_error",
        )
        steps_that_fail[0] = 0
    assert_well(served)


def test_memory_that_runs_out_is_told_and_not_tried_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        raise EngineError("CUDA_ERROR_OUT_OF_MEMORY")

    with served.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "step", step)
            answer = generate(http)
        assert (answer.status_code, error_of(answer)["code"]) == (500, "out_of_memory")
        assert error_of(answer)["message"] == "out of memory: ask for a smaller size or fewer pictures"
        assert answer.headers["x-should-retry"] == "false"
    assert_well(served)


def test_a_bug_is_answered_in_shape_and_its_text_stays_in_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    with served.http() as http, monkeypatch.context() as patch:
        patch.setattr(Service, "submit", broken)
        answer = generate(http)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (500, "internal_error") and "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert_well(served)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(http: httpx2.Client) -> None:
    answer = generate(http, num_inference_steps=100, timeout=0.001)
    assert (answer.status_code, error_of(answer)["code"]) == (429, "deadline_infeasible")
    assert 1 <= int(answer.headers["retry-after"]) <= 120


def test_a_deadline_that_passes(served: Served, http: httpx2.Client) -> None:
    with held() as free:
        threading.Timer(0.6, free.set).start()
        answer = generate(http, num_inference_steps=1, timeout=0.4)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert_well(served)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(served: Served, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"prompt": "x", "size": "64x64", "num_inference_steps": 50, "stream": stream}).encode()
    head = ["POST /v1/images/generations HTTP/1.1", "host: x", "content-type: application/json"]
    head += [f"content-length: {len(body)}", "", ""]
    with held() as free, caplog.at_level(logging.INFO, "latentrt.access"):
        client = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        client.sendall("\r\n".join(head).encode() + body)
        (job,) = until(lambda: served.service.unfinished)
        client.close()
        until(lambda: job.state == "cancelled")
        free.set()
        if not stream:  # the head of a stream has been sent
            until(lambda: " 499 " in caplog.text)
            text = served.metrics.text().decode()
            assert 'status="499"' in text and 'reason="client_gone"' not in text
    assert_well(served)


PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/jobs", "/sdapi/v1/txt2img", "/sdapi/v1/options")


@pytest.mark.parametrize("path", [*PATHS, "/sdapi/v1/interrupt"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_goes_away_while_it_sends_is_no_failure(
    served: Served, path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = [f"POST {path} HTTP/1.1", "host: x", f"content-type: {kind}", "content-length: 1000", "", ""]
    with caplog.at_level(logging.INFO, "latentrt.access"):
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
            client.sendall("\r\n".join(head).encode() + b"--x\r\n")
        (record,) = until(lambda: [each for each in caplog.records if each.name == "latentrt.access"])
    refused = kind != "application/json" and path == "/v1/images/generations"  # before its body is read
    assert vars(record)["status"] == (415 if refused else 499) and vars(record)["code"] != "internal_error"
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("path", [*PATHS, "/sdapi/v1/interrupt"])
def test_a_body_that_is_too_large_or_late_is_told_so_everywhere(path: str) -> None:
    with Served(http=HttpSettings(max_body=10_000, body_timeout=0.3), opened=False) as served, served.http() as http:
        served.service.state = "ready"
        kind = {"content-type": "application/json"}
        chunked = http.post(path, content=iter([b" " * 4096] * 4), headers=kind)
        assert chunked.status_code == 413 and "larger than 10000 bytes" in chunked.text

        def slow() -> Iterator[bytes]:
            yield b" "
            time.sleep(0.6)
            yield b" "

        late = http.post(path, content=slow(), headers=kind)
        assert late.status_code == 408 and "not come within 0.3 s" in late.text


def test_loading_and_draining() -> None:
    with Served(opened=False) as served, served.http() as http:
        for path in ("/health", "/v2/health/ready"):
            assert http.get(path).status_code == 503 and http.get(path).headers["retry-after"]
        assert http.get("/v2/health/live").status_code == 200
        answer = generate(http)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        served.service.open()
        assert http.get("/health").status_code == 200 and generate(http).status_code == 200

        with held() as free, ThreadPoolExecutor() as pool:
            accepted = pool.submit(generate, http)
            until(lambda: served.service.unfinished)
            served.server.drain()
            refused = generate(http)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
            assert http.get("/health").status_code == 503
            free.set()
            assert accepted.result().status_code == 200
        until(lambda: served.server.should_exit)


def test_what_is_not_done_when_the_server_must_go_is_told_so() -> None:
    with Served() as served, served.http() as http, held(), ThreadPoolExecutor() as pool:
        whole = pool.submit(generate, http)
        until(lambda: served.service.unfinished)
        with http.stream("POST", "/v1/images/generations", json={"prompt": "x", "stream": True}) as stream:
            assert stream.status_code == 200 and stream.headers["x-accel-buffering"] == "no"
            assert not served.service.drain(0.1)
            said = stream.read().decode()
        data = json.loads(said.rpartition("data: ")[2])
        assert "event: error" in said and data["error"]["code"] == "draining"
        assert (whole.result().status_code, error_of(whole.result())["code"]) == (503, "draining")


def test_one_key_may_not_take_everything() -> None:
    settings = HttpSettings(keys=("one", "two"))
    with (
        Served(http=settings, limits=Limits(unfinished=1)) as served,
        served.http(headers={"x-api-key": "one"}) as one,
        served.http(headers={"x-api-key": "two"}) as two,
        ThreadPoolExecutor() as pool,
    ):
        with held() as free:
            first = pool.submit(generate, one)
            until(lambda: served.service.unfinished)
            second = generate(one)
            assert (second.status_code, error_of(second)["code"]) == (429, "key_busy")
            other = pool.submit(generate, two)
            until(lambda: len(served.service.unfinished) == 2)
            free.set()
            assert [first.result().status_code, other.result().status_code] == [200, 200]
        assert generate(one).status_code == 200


def test_heartbeats_are_sent_while_nothing_happens() -> None:
    body = {"prompt": "x", "size": "64x64", "stream": True}
    with (
        Served(http=HttpSettings(heartbeat=0.02)) as served,
        served.http() as http,
        held() as free,
        http.stream("POST", "/v1/images/generations", json=body) as stream,
    ):
        lines, comments = stream.iter_lines(), 0
        for line in lines:
            comments += line.startswith(":")
            if comments == 4:
                break
        free.set()
        assert "event: image_generation.completed" in list(lines)


def test_steps_of_which_nothing_is_said_are_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 of 6 s: a comment comes every 10 s all the same."""
    now, sent = 0.0, list[tuple[float, bytes]]()

    class Steps:
        done = 0

        async def next(self, timeout: float) -> Event | None:
            nonlocal now
            if 6.0 * (self.done + 1) - now > timeout:
                now += timeout
                return None
            self.done, now = self.done + 1, 6.0 * (self.done + 1)
            return Stepped(0, self.done, 30) if self.done < 30 else Ended("failed", EngineError("enough"))

        def close(self) -> None:
            pass

    async def read() -> None:
        job = Job(Work({"prompt": "x"}), "embedded", (64, 64), 600.0)
        async for said in sse._stream(job, Steps(), None, [], 10.0):  # type: ignore[arg-type]
            sent.append((now, said.partition(b"\n")[0]))

    monkeypatch.setattr(sse, "time", SimpleNamespace(monotonic=lambda: now))
    asyncio.run(read())
    assert sent == [*((10.0 * number, b": keep-alive") for number in range(18)), (180.0, b"event: error")]


def test_prompts_are_neither_logged_nor_written_into_pictures(
    served: Served, caplog: pytest.LogCaptureFixture, poison: str
) -> None:
    secret = "a very secret castle " * 30  # longer than the tokenizer reads, which is warned of
    with caplog.at_level(logging.DEBUG), served.http() as http:
        answer = generate(http, prompt=secret)
        assert any("is longer than" in warning for warning in answer.json()["warnings"])
        generate(http, prompt=secret, n=0)
        generate(http, prompt=secret * 100)
        generate(http, prompt=poison)
    assert "castle" not in "".join(record.getMessage() for record in caplog.records)
    image = picture(answer.json()["data"][0]["b64_json"])
    image.load()
    assert image.info == {}


def test_prompts_are_written_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with Served(keep_prompts=True) as served, served.http() as http:
        generate(http, prompt="a castle " * 50)
        assert "a castle" in caplog.text and "is longer than" in caplog.text
        image = picture(generate(http, n=2).json()["data"][1]["b64_json"])
        image.load()
        said = json.loads(image.info["latentrt"])
    assert (said["prompt"], said["seed"], said["width"]) == ("a red circle", 8, 64)
