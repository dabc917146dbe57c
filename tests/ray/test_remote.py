"""The ingress and an engine with a call between them that can be lost: what clients of the HTTP server get."""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import DeadlineError, EngineError, QueueFullError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.ray.engine import Engine, QueuePolicy
from latentrt.runtime.ray.service import RemoteModels, RemoteService
from latentrt.runtime.ray.settings import RaySettings
from latentrt.runtime.ray.wire import Done, Failed, Progress, Taken, Told
from latentrt.runtime.service import Pictured, Stepped, Work
from latentrt.runtime.service.errors import BusyError as ServiceBusyError
from latentrt.runtime.service.errors import NotFoundError, RefusedError, UnavailableError
from latentrt.runtime.service.names import named_bundles
from PIL import Image
from pydantic import ValidationError

from . import engines as fake

pytest.importorskip("onnxruntime")
testclient = pytest.importorskip("starlette.testclient", reason="needs the serve extra")

SETTINGS: dict[str, Any] = {
    "bundles": [f"embedded={ensure_bundle()}"],
    "backend": "onnxruntime-cpu",
    "sizes": ["64x64"],
    "slots": 2,
    "fixed_rows": True,
    "max_waiting": 4,
}
FEW: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 4}


class Remote:
    """An ingress over an engine in this process."""

    def __init__(self, engine: Engine) -> None:
        from latentrt.runtime.server import create_app

        settings = RaySettings(**SETTINGS)
        self.engines = fake.Engines(engine)
        models = RemoteModels(named_bundles(settings.bundles), settings.model)
        self.service = RemoteService(self.engines, fake.ERRORS, models, settings.limits)
        self.service.open()
        self.http = testclient.TestClient(create_app(self.service))

    def ask(self, **fields: Any) -> Any:
        return self.http.post("/v1/images/generations", json={**FEW, **fields})

    def later(self, **fields: Any) -> Callable[[], Any]:
        """Ask on another thread, and return what waits for the answer."""
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(self.ask(**fields)))
        thread.start()

        def wait() -> Any:
            thread.join(60)
            return answers[0]

        return wait


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(RaySettings(**SETTINGS))
    yield engine
    engine.service.close()


@pytest.fixture
def remote(engine: Engine) -> Iterator[Remote]:
    remote = Remote(engine)
    yield remote
    remote.service.close()
    until(lambda: not engine.service.unfinished)


def image_of(answer: Any, number: int = 0) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][number]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_picture_comes_as_from_one_machine(remote: Remote) -> None:
    answer = remote.ask(seed=7, n=2)
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as pipe:
        images = pipe("a red circle", width=64, height=64, num_inference_steps=4, seed=7, num_images_per_prompt=2)
    for number, image in enumerate(images.images):
        assert abs(image_of(answer, number) - np.asarray(image).astype(int)).max() <= 1
    assert [each["seed"] for each in answer.json()["data"]] == [7, 8]
    assert answer.json()["timings"]["steps"] == 8 and answer.json()["parameters"]["num_inference_steps"] == 4


def test_what_engines_refuse_reaches_the_client_as_it_is(remote: Remote) -> None:
    answer = remote.ask(sampler="nonsense")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("sampler 'nonsense' is not known: ")
    assert remote.ask(size="63x64").json()["error"]["code"] == "unsupported_size" and len(remote.engines.calls) == 1


@pytest.mark.parametrize("at", ["at once", "on the way"])
def test_a_lost_request_is_drawn_again_with_its_seed(remote: Remote, at: str) -> None:
    alone = remote.ask(num_inference_steps=40)
    seed = alone.json()["data"][0]["seed"]
    remote.engines.calls.clear()
    if at == "at once":
        remote.engines.faults = [fake.LostError()]
    wait = remote.later(seed=seed, num_inference_steps=40)
    if at == "on the way":
        call = until(lambda: remote.engines.calls and remote.engines.calls[0])
        until(lambda: any(isinstance(each, Progress) for each in call.messages))
        call.kill(fake.LostError())
    assert (image_of(wait()) == image_of(alone)).all()
    assert len(remote.engines.calls) == 2


def test_a_random_seed_is_chosen_before_a_request_can_be_lost(remote: Remote) -> None:
    remote.engines.faults = [fake.LostError()]
    answer = remote.ask()
    seeds = {call.work.arguments["seed"] for call in remote.engines.calls}
    assert seeds == {answer.json()["data"][0]["seed"]} and len(remote.engines.calls) == 2


def test_a_request_that_is_lost_twice_is_answered_in_shape(remote: Remote) -> None:
    remote.engines.faults = [fake.LostError(), fake.LostError()]
    answer = remote.ask()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    error = answer.json()["error"]
    assert error["code"] == "replica_lost" and error["type"] == "server_error"
    assert error["message"] == "the replica that drew this was lost: try again"
    assert image_of(remote.ask()).shape == (64, 64, 3)


def test_an_engine_that_has_failed_costs_no_try(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the emptiest until Ray has ended it, and gets most requests."""
    monkeypatch.setattr("latentrt.runtime.ray.service.BUSY_SECONDS", 0.001)
    check, states = remote.engines.engine.service.check_ready, [UnavailableError("x", "failed")] * 3

    def failed() -> None:
        if states:
            raise states.pop()
        check()

    monkeypatch.setattr(remote.engines.engine.service, "check_ready", failed)
    assert image_of(remote.ask()).shape == (64, 64, 3) and len(remote.engines.calls) == 4


def test_too_many_requests_are_told_when_to_come_again(remote: Remote) -> None:
    remote.engines.faults = [fake.BusyError()]
    answer = remote.ask()
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full" and answer.json()["error"]["type"] == "rate_limit_error"
    remote.engines.faults = [fake.GoneError()]
    assert remote.ask().json()["error"]["code"] == "unavailable"


def test_a_lost_request_waits_for_room_elsewhere(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken once, and is not sent away for a queue that is full now."""
    monkeypatch.setattr("latentrt.runtime.ray.service.BUSY_SECONDS", 0.001)
    remote.engines.faults = [fake.LostError(), fake.BusyError(), fake.BusyError()]
    assert image_of(remote.ask()).shape == (64, 64, 3) and len(remote.engines.calls) == 4


def test_who_is_sent_away_is_told_when_a_place_is_free(
    remote: Remote, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.ray.engine.TELL_SECONDS", 0.01)
    job = remote.http.post("/v1/jobs", json={**FEW, "num_inference_steps": 100, "n": 10}).json()
    seconds = until(lambda: _progress(remote, job)["seconds_left"])
    remote.engines.faults = [fake.BusyError()]
    answer = remote.ask()
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= seconds + 1
    remote.http.post(f"/v1/jobs/{job['id']}/cancel")
    held.set()


def test_a_cancelled_job_frees_its_engine(remote: Remote, held: threading.Event) -> None:
    job = remote.http.post("/v1/jobs", json=FEW).json()
    call = until(lambda: remote.engines.calls and remote.engines.calls[0])
    until(lambda: remote.http.get(f"/v1/jobs/{job['id']}").json()["state"] == "queued")
    assert remote.http.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    until(lambda: call.closed)
    assert len(remote.engines.calls) == 1, "it was drawn again"
    held.set()
    until(lambda: not remote.engines.engine.service.unfinished and not remote.service.unfinished)


def test_progress_and_place_in_the_queue_are_known(
    remote: Remote, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.ray.engine.TELL_SECONDS", 0.01)
    job = remote.http.post("/v1/jobs", json={**FEW, "n": 3}).json()
    status = until(lambda: (said := _progress(remote, job))["queue_position"] is not None and said)
    assert (status["queue_position"], status["total_images"]) == (0, 3)
    held.set()
    until(lambda: _progress(remote, job)["images"] == 3)


def _progress(remote: Remote, job: dict[str, Any]) -> dict[str, Any]:
    return dict(remote.http.get(f"/v1/jobs/{job['id']}").json()["progress"])


def test_a_stream_has_previews_and_ends_with_the_picture(remote: Remote) -> None:
    with remote.http.stream(
        "POST", "/v1/images/generations", json={**FEW, "num_inference_steps": 12, "stream": True, "partial_images": 1}
    ) as answer:
        text = answer.read().decode()
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == ["image_generation.partial_image", "image_generation.completed"]


def test_the_ingress_waits_for_an_engine_and_refuses_other_bundles(engine: Engine) -> None:
    settings = RaySettings(**SETTINGS)
    for described, state in ((None, "ready"), ({"embedded": ("another", None)}, "failed"), ({}, "failed")):
        engines = fake.Engines(engine)
        engines.late, engines.described_as = [fake.LostError(), fake.GoneError()], described
        models = RemoteModels(named_bundles(settings.bundles), settings.model)
        service = RemoteService(engines, fake.ERRORS, models)
        assert service.state == "loading"
        service.open()
        assert service.state == state
        service.close()


def test_sizes_that_engines_have_are_known_to_the_ingress(remote: Remote) -> None:
    models = remote.service.models
    assert isinstance(models, RemoteModels)
    (model,) = models
    assert model.allowed is None and model.state == "ready"
    models.heard({"embedded": (model.digest, ((64, 64),))})
    answer = remote.ask(size="128x128")
    assert answer.status_code == 400 and answer.json()["error"]["message"].endswith("this server draws 64x64")


def test_an_engine_yields_what_happens(engine: Engine) -> None:
    async def collected() -> list[Any]:
        work = Work({"prompt": "x", "num_inference_steps": 3, "width": 64, "height": 64, "seed": 1})
        return [message async for message in engine.draw(work)]

    messages = asyncio.run(collected())
    assert messages[0] == Taken((64, 64)) and isinstance(messages[-1], Done)
    kinds = [type(message) for message in messages[1:-1]]
    assert kinds[0] is kinds[-1] is Told and kinds[-2] is Pictured and set(kinds) == {Told, Progress, Pictured}
    assert messages[-4].step == Stepped(0, 3, 3), "the last step is always told"


def test_the_ingress_shows_what_engines_are_at(
    remote: Remote, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.ray.engine.TELL_SECONDS", 0.01)
    (replica,) = {remote.engines.engine.told().replica}
    labels = f'{{model="embedded",replica="{replica}"}}'

    def shown(name: str) -> float | None:
        found = re.search(
            rf"^latentrt_{name}{re.escape(labels)} (\S+)$", remote.http.get("/metrics").text, re.MULTILINE
        )
        return None if found is None else float(found[1])

    assert shown("queue_images") is shown("admissions_total") is None
    job = remote.http.post("/v1/jobs", json={**FEW, "n": 3}).json()
    until(lambda: (shown("queue_images") or 0) + (shown("running_images") or 0) == 3)
    assert shown("slots") == 2
    held.set()
    until(lambda: _progress(remote, job)["images"] == 3)
    until(lambda: shown("running_images") == shown("queue_images") == 0)
    assert shown("admissions_total") == remote.engines.engine.service.models.find(None).figures.counts["admissions"]
    monkeypatch.setattr("latentrt.runtime.ray.service.SILENT_SECONDS", 0.0)
    assert shown("queue_images") is None and (shown("steps_total") or 0) > 0
    monkeypatch.setattr("latentrt.runtime.ray.service.FORGET_SECONDS", 0.0)
    assert shown("steps_total") is None


def test_an_engine_that_nobody_listens_to_drops_its_job(engine: Engine, held: threading.Event) -> None:
    async def left_alone(after: int) -> None:
        stream = engine.draw(Work({"prompt": "x", "num_inference_steps": 3, "width": 64, "height": 64}))

        async def listen() -> None:
            async for _ in stream:
                pass

        task = asyncio.ensure_future(listen())
        while len(engine.service.unfinished) < after:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait((task,))

    for after in (0, 1):  # while it is submitted, and when it waits
        asyncio.run(left_alone(after))
    held.set()
    until(lambda: not engine.service.unfinished)


def test_health_is_that_of_the_batcher(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_health()
    (model,) = engine.service.models
    assert model.batcher is not None
    monkeypatch.setattr(engine.service, "state", "ready")
    monkeypatch.setattr(model.batcher._tally, "failures_in_a_row", 3)
    with pytest.raises(EngineError, match="3 steps of model embedded failed in a row"):
        engine.check_health()
    monkeypatch.setattr(engine.service, "state", "ready")
    monkeypatch.setattr(model.batcher._tally, "failures_in_a_row", 0)
    monkeypatch.setattr(model.batcher, "_turn_began", time.monotonic() - 121)
    with pytest.raises(EngineError, match="a step of model embedded has hung for 121 s"):
        engine.check_health()
    assert engine.service.state == "failed"
    with pytest.raises(EngineError, match="the device has failed"):
        engine.check_health()


@pytest.mark.parametrize("asked", ["by Ray", "by a request"])
def test_an_engine_that_is_no_good_gives_its_work_away(
    engine: Engine, held: threading.Event, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    work = Work({"prompt": "x", "num_inference_steps": 3, "width": 64, "height": 64})
    (model,) = engine.service.models
    assert model.batcher is not None
    monkeypatch.setattr(engine.service, "state", "ready")
    tally = model.batcher._tally

    async def drawn() -> list[Any]:
        taken = engine.draw(work)
        assert isinstance(await anext(taken), Taken)
        monkeypatch.setattr(tally, "failures_in_a_row", 3)
        if asked == "by Ray":
            with pytest.raises(EngineError):
                engine.check_health()
        late = [message async for message in engine.draw(work)]
        return [*late, [message async for message in taken][-1]]

    refused, ended = (message.error for message in asyncio.run(drawn()))
    assert engine.service.state == "failed"
    assert isinstance(refused, UnavailableError) and refused.code == "failed"
    assert isinstance(ended, UnavailableError) and ended.code == "replica_lost"
    held.set()
    until(lambda: not engine.service.unfinished)


@pytest.mark.parametrize(
    "error",
    [
        RequestError("a"),
        RefusedError("a", "size", "unsupported_size"),
        QueueFullError("a", 2.5),
        DeadlineError("a", 3.0),
        ServiceBusyError("a", "key_busy", 1.0),
        UnavailableError("a", "failed", 5.0),
        NotFoundError("a", "model", "model_not_found"),
        EngineError("a"),
        ZeroDivisionError("a"),
    ],
)
def test_errors_arrive_as_they_were_raised(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(Failed.of(error))).error
    assert type(arrived) is type(error) and str(arrived) == "a" and vars(arrived) == vars(error)


def test_replicas_follow_the_work_there_is(engine: Engine, held: threading.Event) -> None:
    assert engine.record_autoscaling_stats() == {"queue_seconds": 0.0}
    job = engine.service.submit(Work({"prompt": "x", "num_inference_steps": 50, "width": 64, "height": 64}))
    assert engine.record_autoscaling_stats()["queue_seconds"] > 0
    job.cancel()
    policy = QueuePolicy(seconds=4.0)
    for work, wanted in (({}, 1), ({"a": 4.0}, 1), ({"a": 4.0, "b": 0.1}, 2), ({"a": 30.0, "b": 1.0}, 8)):
        ctx = SimpleNamespace(aggregated_metrics={"queue_seconds": work}, capacity_adjusted_min_replicas=1)
        assert policy(ctx) == (wanted, {})
    assert policy(SimpleNamespace(aggregated_metrics=None, capacity_adjusted_min_replicas=0)) == (0, {})


@pytest.mark.parametrize("calls", ["waits", "taken", "lost waits", "busy"])
def test_a_deadline_passes_wherever_a_request_is(remote: Remote, monkeypatch: pytest.MonkeyPatch, calls: str) -> None:
    """In Ray's queue, at an engine that counts from when it was asked, in the queue again, and between tries."""
    left, asked = calls.split(), list[float]()

    async def draw(engine: Engine, work: Work) -> AsyncIterator[Any]:
        assert work.timeout is not None
        asked.append(work.timeout)
        what = left.pop(0)
        if what != "waits":
            yield Taken((64, 64))
        if what == "lost":
            raise fake.LostError
        if what == "busy":
            yield Failed.of(QueueFullError("x"))
        await asyncio.sleep(60)

    monkeypatch.setattr(Engine, "draw", draw)
    monkeypatch.setattr(remote.service._deadlines, "watch", lambda job: None)  # which knows those alone that load
    answer = remote.ask(timeout=0.5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    until(lambda: all(call.closed for call in remote.engines.calls) and not remote.service.unfinished)
    assert not left and sorted(asked, reverse=True) == asked and asked[0] <= 0.5
    (model,) = remote.service.models
    assert model.figures.counts["deadlines_missed"] == 1


@pytest.mark.parametrize(
    "given",
    [
        {"step_timeout": 0},
        {"step_timeout": float("nan")},
        {"drain_timeout": float("inf")},
        {"drain_timeout": -1},
        {"timeout": float("inf")},
        {"max_work": 0},
        {"max_wait": float("nan")},
        {"queue_seconds": float("inf")},
        {"upscale_delay": float("nan")},
        {"max_images": 0},
        {"num_gpus": -1},
        {"rows": 4, "slots": 8},
        {"slots": 600},
    ],
    ids=str,
)
def test_settings_that_do_harm_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        RaySettings(bundles=["/a"], **given)


def test_settings_are_read_from_texts() -> None:
    given = {"bundles": "/a, b=/c", "sizes": "64x64,128x64", "options": '{"threads": 2}', "aliases": "x=b"}
    settings = RaySettings(**given, backend="openvino", slots="8", queue_seconds="2.5", num_cpus="3")  # type: ignore[arg-type]
    assert settings.bundles == ["/a", "b=/c"] and settings.aliases == {"x": "b"}
    with pytest.raises(ValidationError, match="alias x is given for b and for c"):
        RaySettings(bundles="/a", aliases="x=b,x=c")  # type: ignore[arg-type]
    assert settings.model.sizes == ((64, 64), (128, 64)) and settings.model.options == {"threads": 2}
    assert (settings.slots, settings.queue_seconds, settings.gpus) == (8, 2.5, 0)
    assert RaySettings(bundles="/a").gpus == 1 and RaySettings(bundles="/a", num_gpus=0.5).gpus == 0.5  # type: ignore[arg-type]
    assert RaySettings(bundles="/a", backend="onnxruntime-cpu", num_cpus=2).model.options == {"threads": 2}  # type: ignore[arg-type]
