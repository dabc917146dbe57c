"""Several bundles in one process: by name, within a budget, opened beside what runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import BundleError, EngineError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.loop.session import Session
from latentrt.runtime.service import Job, Models, ModelSettings, Service
from latentrt.runtime.service.models import Model
from latentrt.runtime.service.names import named_aliases, named_bundles

from ..conftest import calls_held
from .conftest import Served, error_of, generate, held, opening_held, until


def bundles(*names: str) -> dict[str, Bundle]:
    return {name: Bundle.open(ensure_bundle()) for name in names}


@pytest.fixture(scope="module", autouse=True)
def cold() -> Iterator[None]:
    """Bundles are opened often here, and warming them up takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batcher, "warm_up", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def pair(cold: None) -> Iterator[tuple[Served, httpx2.Client]]:
    """Two bundles with room for both."""
    with Served(bundles("one", "two"), aliases={"gpt-image-1": "two"}) as served, served.http() as http:
        yield served, http


def closed(served: Served, name: str) -> Model:
    """Close a bundle, as if there were no room for it."""
    model = served.service.models.find(name)
    model.close(model.taken())
    return model


@pytest.fixture(scope="module")
def room() -> int:
    """Bytes in which one bundle fits and two do not."""
    model = Model("embedded", Bundle.open(ensure_bundle()), ModelSettings())
    return int(1.5 * model.nbytes)


def states(served: Served) -> dict[str, str]:
    return {model.name: model.state for model in served.service.models}


def test_models_by_name_and_by_other_names(pair: tuple[Served, httpx2.Client]) -> None:
    served, http = pair
    assert states(served) == {"one": "ready", "two": "ready"}
    asked = (None, "one"), ("one", "one"), ("two", "two"), ("gpt-image-1", "two")
    assert [generate(http, model=name).json()["model"] for name, _ in asked] == [found for _, found in asked]
    answer = generate(http, model="three")
    assert answer.status_code == 404 and "one, two, gpt-image-1" in error_of(answer)["message"]
    assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["one", "two"]
    assert http.get("/v1/models/gpt-image-1").json()["id"] == "two"


def test_the_longest_idle_bundle_goes_for_another(room: int) -> None:
    with Served(bundles("one", "two", "three"), budget=room) as served, served.http() as http:
        assert states(served) == {"one": "ready", "two": "cold", "three": "cold"}
        first = generate(http, model="one").json()["data"]
        for name in ("two", "three", "one"):
            assert generate(http, model=name).status_code == 200
            assert states(served) == {each: "ready" if each == name else "cold" for each in ("one", "two", "three")}
        assert generate(http, model="one").json()["data"][0]["seed"] == first[0]["seed"]
        text = http.get("/metrics").text
        assert 'latentrt_model_loads_total{model="one",outcome="succeeded"} 2.0' in text
        assert 'latentrt_admissions_total{model="one"} 3.0' in text  # those before it was closed are counted
        held = set(re.findall(r'latentrt_memory_bytes{graph="denoiser",kind="weights",model="(\w+)"}', text))
        assert held == {"one"}


def test_nothing_is_closed_in_vain() -> None:
    """For a bundle that has no room beside one with work, even without those that have none."""
    files = Model("embedded", Bundle.open(ensure_bundle()), ModelSettings()).nbytes
    with Served(bundles("one", "two", "three"), budget=int(2.5 * files)) as served, served.http() as http:
        for model in served.service.models:
            model.nbytes = files * (2 if model.name == "three" else 1)
        assert states(served) == {"one": "ready", "two": "ready", "three": "cold"}
        with held() as free, ThreadPoolExecutor() as pool:
            running = pool.submit(generate, http, model="two")
            until(lambda: served.service.unfinished)
            for _ in range(2):
                assert error_of(generate(http, model="three"))["code"] == "model_not_loaded"
                assert states(served) == {"one": "ready", "two": "ready", "three": "cold"}
            free.set()
            assert running.result().status_code == 200
        until(lambda: not served.service.unfinished)
        assert generate(http, model="three").status_code == 200
        assert states(served) == {"one": "cold", "two": "cold", "three": "ready"}


def test_a_bundle_with_work_stays(room: int, caplog: pytest.LogCaptureFixture) -> None:
    with Served(bundles("one", "two"), budget=room) as served, served.http() as http, ThreadPoolExecutor() as pool:
        with held() as free:
            running = pool.submit(generate, http, model="one")
            until(lambda: served.service.unfinished)
            answer = generate(http, model="two")
            assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_loaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            assert "failed" not in caplog.text
            free.set()
            assert running.result().status_code == 200
        until(lambda: not served.service.unfinished)
        assert generate(http, model="two").status_code == 200
        assert 'model="two",outcome="refused",task="generation"} 1.0' in http.get("/metrics").text


def test_a_stream_of_a_bundle_without_room_has_the_same_answer(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that is known before anybody listens."""
    submit = Service.submit

    def slow(service: Service, *given: Any, **named: Any) -> Job:
        job = submit(service, *given, **named)
        assert job.wait(60)
        return job

    with Served(bundles("one", "two"), budget=room) as served, served.http() as http:
        one = served.service.models.find("one")
        served.service.models.hold(one)  # as a request does
        monkeypatch.setattr(Service, "submit", slow)
        answer = generate(http, model="two", stream=True)
        served.service.models.let_go(one)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_not_loaded")
    assert 1 <= int(answer.headers["retry-after"]) <= 120


@pytest.mark.parametrize(("taken", "budget", "beside"), [(1.2, 2.1, 1), (1.2, 2.3, 1), (1.2, 2.5, 2), (3.0, 2.1, 1)])
def test_a_bundle_is_reckoned_by_what_opening_it_took(
    monkeypatch: pytest.MonkeyPatch, taken: float, budget: float, beside: int
) -> None:
    """In multiples of its files' bytes, of which two would fit each time."""
    files = Model("embedded", Bundle.open(ensure_bundle()), ModelSettings()).nbytes
    monkeypatch.setattr(Session, "bytes_taken", int(taken * files))
    with Served(bundles("one", "two", "three"), budget=int(budget * files)) as served, served.http() as http:
        ready = ["one", "two"][:beside]
        for name in ("one", "two", "three", "one"):
            assert generate(http, model=name).status_code == 200
            until(lambda: not served.service.unfinished)
            ready = [*(each for each in ready if each != name), name][-beside:]
            assert {each for each, state in states(served).items() if state == "ready"} == set(ready)
        assert {model.nbytes for model in served.service.models} == {int(taken * files)}


def test_opening_one_holds_up_no_other(pair: tuple[Served, httpx2.Client]) -> None:
    served, http = pair
    two, asked = closed(served, "two"), {"prompt": "x", "size": "64x64", "model": "two", "num_inference_steps": 2}
    with ThreadPoolExecutor() as pool, opening_held() as free:
        waiting = pool.submit(generate, http, model="two")
        job = http.post("/v1/jobs", json=asked).json()
        until(lambda: len(served.service.unfinished) == 2)
        assert job["state"] == "loading" and states(served)["two"] == "loading"
        assert [generate(http, model="one").status_code for _ in range(3)] == [200] * 3
        assert http.get("/health").status_code == 200
        cancelled = http.post("/v1/jobs", json=asked).json()
        http.post(f"/v1/jobs/{cancelled['id']}/cancel")
        free.set()
        assert waiting.result().status_code == 200
    until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded")
    assert http.get(f"/v1/jobs/{cancelled['id']}").json()["state"] == "cancelled"
    until(lambda: two.unfinished == 0)


def ask(http: httpx2.Client, stream: bool, **fields: Any) -> httpx2.Response:
    body = {"prompt": "x", "size": "64x64", "stream": stream, "model": "two", **fields}
    return http.post("/v1/images/generations", json=body)


def test_what_is_known_only_once_a_bundle_is_open_has_the_same_answer(pair: tuple[Served, httpx2.Client]) -> None:
    served, http = pair
    closed(served, "two")
    with ThreadPoolExecutor() as pool, opening_held() as free:
        bad = [pool.submit(ask, http, stream, sampler="nothing") for stream in (False, True)]
        good = [pool.submit(ask, http, stream, num_inference_steps=2) for stream in (False, True)]
        until(lambda: len(served.service.unfinished) == 4)
        free.set()
        for each in bad:
            assert each.result().status_code == 400 and error_of(each.result())["param"] == "sampler"
        assert [each.result().status_code for each in good] == [200, 200]


def test_a_bundle_that_cannot_be_opened(pair: tuple[Served, httpx2.Client], monkeypatch: pytest.MonkeyPatch) -> None:
    served, http = pair
    closed(served, "two")
    with monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            raise EngineError("no such device")

        patch.setattr(Model, "open", fails)
        answer = generate(http, model="two")
        assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_error")
        assert generate(http, model="one").status_code == 200
    assert generate(http, model="two").status_code == 200  # it is tried again
    assert 'outcome="failed"} 1.0' in http.get("/metrics").text


def test_sizes_of_a_static_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's: what is not warmed up has no engines, and none are built for a request."""
    with Served() as served, served.http() as http:
        model = served.service.models.find(None)
        assert model.batcher is not None
        generate(http)  # opens the size, as warming up does
        monkeypatch.setattr(type(model.batcher.pipe.backend), "dynamic", property(lambda backend: False))
        answer = generate(http, size="128x64")
        assert (answer.status_code, error_of(answer)["code"]) == (400, "unsupported_size")
        assert "64x64" in error_of(answer)["message"] and generate(http, size="auto").json()["size"] == "64x64"
        assert http.get("/v1/models/embedded").json()["other_sizes"] is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundles": {}}, "no bundle"),
        ({"aliases": {"a": "b"}}, "alias a=b"),
        ({"budget": 1000}, "more than all may have"),
        ({"settings": ModelSettings(sizes=((65, 64),))}, "multiple of 8"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Models(**{"bundles": bundles("one"), "settings": ModelSettings(), **given})


def test_names_of_bundles(tmp_path: Path) -> None:
    path = str(ensure_bundle())
    assert list(named_bundles([f"mine={path}", path])) == ["mine", Path(path).name]
    with pytest.raises(RequestError, match="give NAME=PATH"):
        named_bundles([path, path])
    for text in ("", f"={path}", "mine="):
        with pytest.raises(RequestError, match=f"bundle is '{text}': give PATH or NAME=PATH"):
            named_bundles([text])
    with pytest.raises(BundleError, match="does not exist"):
        named_bundles([str(tmp_path / "a=b")])


def test_names_of_aliases() -> None:
    assert named_aliases(["a=one", "b=one", "a=one"]) == {"a": "one", "b": "one"}
    Models(bundles("one"), ModelSettings(), aliases={"one": "one"})
    with pytest.raises(RequestError, match="alias one=two hides bundle one"):
        Models(bundles("one", "two"), ModelSettings(), aliases={"one": "two"})
    with pytest.raises(RequestError, match="alias a is given for one and for two"):
        named_aliases(["a=one", "a=two"])
    for wrong in ("a", "a=", "=one"):
        with pytest.raises(RequestError, match="give NAME=MODEL"):
            named_aliases([wrong])


def test_what_was_counted_stays_while_a_bundle_is_closed(room: int) -> None:
    with Served(bundles("one", "two"), budget=room) as served, served.http() as http, ThreadPoolExecutor() as pool:
        assert generate(http, model="one").status_code == 200
        model = served.service.models.find("one")
        before = dict(model.figures.counts)
        assert before["steps"] > 0 and before["admissions"] == 1
        with calls_held(Batcher, "close") as free:
            other = pool.submit(generate, http, model="two")
            assert free.reached.wait(60)
            assert model.batcher is None and not model.figures.gauges and model.figures.counts == before
            assert 'latentrt_admissions_total{model="one"} 1.0' in http.get("/metrics").text
            free.set()
            assert other.result().status_code == 200
        assert model.figures.counts == before
        assert generate(http, model="one").status_code == 200
        assert model.figures.counts["admissions"] == 2


def test_a_bundle_that_cannot_be_closed_fails_no_other(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Served(bundles("one", "two"), budget=room) as served, served.http() as http:
        assert generate(http, model="one").status_code == 200
        model, close = served.service.models.find("one"), Batcher.close

        def fails(batcher: Batcher, **named: Any) -> None:
            close(batcher, **named)
            raise EngineError("the device is lost")

        with monkeypatch.context() as patch:
            patch.setattr(Batcher, "close", fails)
            assert generate(http, model="two").status_code == 200
        assert states(served) == {"one": "cold", "two": "ready"} and model.figures.counts["admissions"] == 1


def test_a_batcher_that_was_closed_leaves_no_thread(room: int) -> None:
    with Served(bundles("one", "two"), budget=room) as served, served.http() as http:
        before = sum(thread.name == "latentrt batcher" for thread in threading.enumerate())
        for name in ("two", "one", "two"):
            assert generate(http, model=name).status_code == 200
        assert sum(thread.name == "latentrt batcher" for thread in threading.enumerate()) == before


def test_all_bundles_are_closed_on_a_device_that_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    close = Batcher.close

    def lost(batcher: Batcher, *, cancel: bool = False) -> None:
        close(batcher, cancel=cancel)
        raise EngineError("the device is lost")

    monkeypatch.setattr(Batcher, "close", lost)
    with Served(bundles("one", "two")) as served, served.http() as http:
        assert [generate(http, model=name).status_code for name in ("one", "two")] == [200, 200]
        served.service.close()
        assert states(served) == {"one": "cold", "two": "cold"}
        assert all(model.counted["admissions"] == 1 for model in served.service.models)
    assert [record.getMessage() for record in caplog.records if "not closed" in record.message] == [
        f"bundle {name} was not closed whole: the device is lost" for name in ("one", "two")
    ]
