"""What waits while a bundle is being opened: within a bound, to its deadline, and until the server goes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import DeadlineError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.server import HttpSettings
from latentrt.runtime.service import Job, Limits, Work, deadlines

from .conftest import Served, error_of, generate, opening_held, until

ASKED: dict[str, Any] = {"prompt": "x", "size": "64x64", "num_inference_steps": 2, "model": "two"}
MOST = 3


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Two bundles, of which the second is opened when it is asked for."""
    found = {name: Bundle.open(ensure_bundle()) for name in ("one", "two")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batcher, "warm_up", lambda *_: None)  # which takes most of the time
        http = HttpSettings(heartbeat=1.0)
        with Served(found, limits=Limits(unfinished=MOST + 1), http=http, max_waiting=MOST) as running:
            yield running


@pytest.fixture
def opening(served: Served) -> Iterator[threading.Event]:
    """Close the second bundle, and hold its opening until the event is set."""
    model = served.service.models.find("two")
    model.close(model.taken())
    with opening_held() as free:
        yield free
    until(lambda: not served.service.unfinished and model.state != "loading")


def test_what_waits_for_a_bundle_has_a_bound(served: Served, http: httpx2.Client, opening: threading.Event) -> None:
    jobs = [http.post("/v1/jobs", json=ASKED) for _ in range(MOST)]
    assert [job.status_code for job in jobs] == [202] * MOST
    for path in ("/v1/jobs", "/v1/images/generations"):
        full = http.post(path, json=ASKED)
        assert (full.status_code, error_of(full)["code"]) == (429, "queue_full")
        assert f"{MOST} images wait for model two to be opened: at most {MOST} may" in error_of(full)["message"]
    assert generate(http, model="one").status_code == 200
    http.post(f"/v1/jobs/{jobs[0].json()['id']}/cancel")
    jobs[0] = http.post("/v1/jobs", json=ASKED)
    assert jobs[0].status_code == 202  # there is room again
    opening.set()
    for job in jobs:
        until(lambda: http.get(f"/v1/jobs/{job.json()['id']}").json()["state"] == "succeeded")  # noqa: B023


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_passes_while_a_bundle_is_opened(
    http: httpx2.Client, opening: threading.Event, stream: bool
) -> None:
    job = http.post("/v1/jobs", json={**ASKED, "timeout": 0.2}).json()
    late = http.post("/v1/images/generations", json={**ASKED, "timeout": 0.2, "stream": stream})
    assert (late.status_code, error_of(late)["code"]) == (504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false" and "retry-after" not in late.headers
    said = until(lambda: (found := http.get(f"/v1/jobs/{job['id']}").json())["finished"] and found)
    assert (said["state"], said["error"]["code"]) == ("failed", "deadline_exceeded")
    assert not opening.is_set()


def test_a_stream_begins_while_a_bundle_is_opened(
    served: Served, http: httpx2.Client, opening: threading.Event
) -> None:
    """And tells later what is wrong with the request."""
    with http.stream("POST", "/v1/images/generations", json={**ASKED, "stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert stream.status_code == 200 and [next(lines), next(lines)] == [": keep-alive"] * 2
        (job,) = served.service.unfinished
        job.end("failed", RequestError("size is 64x64: this bundle draws no such thing"))
        name, data = lines
    said = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and said["error"]["param"] == "size" and not opening.is_set()


def test_a_client_that_goes_while_a_bundle_is_opened_cancels_its_stream(
    served: Served, opening: threading.Event
) -> None:
    body = json.dumps({**ASKED, "stream": True}).encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        (job,) = until(lambda: served.service.unfinished)
    until(lambda: job.state == "cancelled")
    assert not opening.is_set()


def test_a_bundle_that_is_opened_too_late_draws_nothing(
    served: Served, opening: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines.Deadlines, "watch", lambda *_: None)
    work = Work({"prompt": "x", "width": 64, "height": 64, "num_inference_steps": 2}, model="two", timeout=0.05)
    job = served.service.submit(work)
    time.sleep(0.1)
    opening.set()
    assert job.wait(60) and isinstance(job.error, DeadlineError) and job.error.seconds is None


def test_a_request_that_was_cancelled_meanwhile_counts_no_more(
    served: Served, http: httpx2.Client, opening: threading.Event
) -> None:
    def cancelled() -> float:
        labels = {"model": "two", "task": "generation", "outcome": "cancelled"}
        return served.metrics.registry.get_sample_value("latentrt_requests_total", labels) or 0.0

    model, before = served.service.models.find("two"), cancelled()
    for _ in range(2 * MOST):  # more than a key may have, and than may wait
        job = http.post("/v1/jobs", json=ASKED)
        assert job.status_code == 202, job.text
        assert http.delete(f"/v1/jobs/{job.json()['id']}").status_code == 204
        until(lambda: not served.service.unfinished)
    assert model.unfinished == 0 and cancelled() == before + 2 * MOST


def test_a_request_that_ends_as_soon_as_it_is_found_is_counted_out(
    served: Served, opening: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, add = served.service, served.service.store.add

    def cancelled(job: Job, *named: Any) -> None:
        add(job, *named)
        assert job.cancel()

    monkeypatch.setattr(service.store, "add", cancelled)
    job = service.submit(Work({"prompt": "x", "width": 64, "height": 64}, model="two"), keep=True)
    assert job.state == "cancelled" and service.unfinished == [] and service.models.find("two").unfinished == 0


def test_a_request_that_was_cancelled_meanwhile_is_not_missed_by_a_server_that_goes(
    served: Served, http: httpx2.Client, opening: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = http.post("/v1/jobs", json=ASKED).json()
    assert http.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    monkeypatch.setattr(served.service, "state", "ready")  # again, after the test
    assert served.service.drain(0.1) is True
