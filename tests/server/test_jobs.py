"""Jobs: an id at once, progress, place in the queue, pictures, cancelling, and nobody else's business."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx2
import pytest
from latentrt.runtime.server import HttpSettings
from latentrt.runtime.service import Event, Job, Pictured, Previewed, Work
from latentrt.runtime.service.pictures import Picture
from latentrt.runtime.service.service import PREVIEW
from PIL import Image

from .conftest import FEW, Served, error_of, held, png, until

SMALL: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", **FEW}


def submit(http: httpx2.Client, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/jobs", json={**SMALL, **fields}, headers=headers)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    return dict(response.json())


def done(http: httpx2.Client, id: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        said = http.get(f"/v1/jobs/{id}").json()
        return said if said["state"] in ("succeeded", "failed", "cancelled") else None

    return dict(until(over))


def test_a_job_from_its_id_to_its_pictures(served: Served, http: httpx2.Client) -> None:
    with held() as free:
        first, second = submit(http, n=2), submit(http, quality="high")
        assert (
            first["state"] == "queued" and first["progress"]["total_images"] == 2 and second["ignored"] == ["quality"]
        )
        queued = http.get(f"/v1/jobs/{second['id']}")
        said = queued.json()
        assert said["progress"]["queue_position"] == 2 and said["progress"]["seconds_left"] > 0
        assert (said["data"], said["error"], said["finished"]) == ([], None, None) and queued.headers[
            "retry-after"
        ] == "1"
        free.set()
        ended = done(http, first["id"])
    assert ended["state"] == "succeeded" and ended["task"] == "generation"
    assert ended["progress"] | {"seconds_left": None} == {
        **{"steps": 8, "total_steps": 8, "images": 2, "total_images": 2, "queue_position": None, "seconds_left": None}
    }
    whole = http.post("/v1/images/generations", json={**SMALL, "n": 2}).json()
    assert [each["seed"] for each in ended["data"]] == [each["seed"] for each in whole["data"]] == [7, 8]
    assert ended["timings"]["steps"] == 8 and ended["bundle"] == whole["bundle"]
    for index in (0, 1):
        picture = http.get(f"/v1/jobs/{first['id']}/images/{index}")
        assert picture.headers["content-type"] == "image/png" and picture.headers["x-seed"] == str(7 + index)
        assert picture.content == base64.b64decode(ended["data"][index]["b64_json"])
        assert Image.open(io.BytesIO(picture.content)).size == (64, 64)
    missing = http.get(f"/v1/jobs/{first['id']}/images/2")
    assert (missing.status_code, error_of(missing)["param"]) == (404, "number")


def test_a_job_with_a_picture_is_an_edit(http: httpx2.Client) -> None:
    picture = base64.b64encode(png(Image.new("RGB", (64, 64), "red"))).decode()
    by_json = submit(http, image=f"data:image/png;base64,{picture}", strength=0.5)
    assert done(http, by_json["id"])["task"] == "edit"
    files = {"image": ("a.png", base64.b64decode(picture), "image/png")}
    data = {"prompt": "a red circle", "num_inference_steps": "4", "seed": "7", "strength": "0.5"}
    by_form = http.post("/v1/jobs", data=data, files=files)
    assert done(http, by_form.json()["id"])["data"][0]["seed"] == 7


def test_cancelling_one_job_leaves_the_others(served: Served, http: httpx2.Client) -> None:
    with held() as free:
        kept, dropped = submit(http), submit(http)
        said = http.post(f"/v1/jobs/{dropped['id']}/cancel")
        assert said.status_code == 200 and said.json()["state"] == "cancelled"
        assert said.json()["error"]["code"] == "cancelled"
        free.set()
        assert done(http, kept["id"])["state"] == "succeeded"
    again = http.post(f"/v1/jobs/{kept['id']}/cancel").json()  # one that is over stays as it is
    assert again["state"] == "succeeded" and again["data"]
    assert http.get(f"/v1/jobs/{dropped['id']}").json()["data"] == []
    until(lambda: not served.service.unfinished)


def test_a_job_that_is_forgotten(http: httpx2.Client) -> None:
    job = submit(http)
    assert http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_an_idempotency_key_gives_the_same_job(served: Served, http: httpx2.Client) -> None:
    key = {"idempotency-key": "my-key-1"}
    first, again, other = submit(http, key), submit(http, key), submit(http, {"idempotency-key": "my-key-2"})
    assert first["id"] == again["id"] != other["id"]
    assert done(http, first["id"])["state"] == "succeeded"
    assert submit(http, key)["data"] == done(http, first["id"])["data"]
    reused = http.post("/v1/jobs", json={**SMALL, "seed": 8}, headers=key)
    assert (reused.status_code, error_of(reused)["code"]) == (422, "idempotency_key_reused")
    long = http.post("/v1/jobs", json=SMALL, headers={"idempotency-key": "x" * 256})
    assert long.status_code == 400 and error_of(long)["param"] == "Idempotency-Key"


def test_an_idempotency_key_of_a_form(http: httpx2.Client) -> None:
    """Of which every sending has another boundary."""

    def sent(colour: str = "red", **fields: str) -> httpx2.Response:
        files = {"image": ("a.png", png(Image.new("RGB", (64, 64), colour)), "image/png")}
        given = {"prompt": "x", "num_inference_steps": "4", "strength": "0.5", **fields}
        return http.post("/v1/jobs", data=given, files=files, headers={"idempotency-key": "of-a-form"})

    first, again = sent(), sent()
    assert first.status_code == again.status_code == 202 and first.json()["id"] == again.json()["id"]
    assert error_of(sent("blue"))["code"] == error_of(sent(seed="1"))["code"] == "idempotency_key_reused"


def test_an_idempotency_key_of_requests_that_come_at_once(served: Served) -> None:
    until(lambda: not served.service.unfinished)
    with held(), ThreadPoolExecutor(8) as pool, served.http() as http:
        key = {"idempotency-key": "at-once"}
        found = {job["id"] for job in pool.map(lambda _: submit(http, key), range(8))}
        assert len(found) == 1 and len(served.service.unfinished) == 1
        http.post(f"/v1/jobs/{found.pop()}/cancel")


def test_an_idempotency_key_gives_its_job_while_nothing_more_is_taken(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"idempotency-key": "before-the-end"}
    job = served.service.store.find("", submit(http, key)["id"])
    assert job.wait(60)
    monkeypatch.setattr(served.service, "state", "draining")
    job.asked = 0.0
    assert submit(http, key)["id"] == job.id and job.asked > 0  # which a drain waits for
    for headers, seed, code in ((key, 8, "idempotency_key_reused"), ({"idempotency-key": "new"}, 7, "draining")):
        assert error_of(http.post("/v1/jobs", json={**SMALL, "seed": seed}, headers=headers))["code"] == code
    assert error_of(http.post("/v1/jobs", json=SMALL))["code"] == "draining"


def test_what_is_wrong_with_a_job_is_said_at_once(http: httpx2.Client) -> None:
    for fields, param in (({"n": 0}, "n"), ({"stream": True}, "stream"), ({"size": "65x64"}, "size")):
        answer = http.post("/v1/jobs", json={**SMALL, **fields})
        assert answer.status_code == 400 and error_of(answer)["param"] == param


def test_the_error_of_a_job_that_failed_is_kept(http: httpx2.Client) -> None:
    with held() as free:
        job = submit(http, num_inference_steps=1, timeout=0.5)
        assert not free.wait(0.6)
        free.set()
        said = done(http, job["id"])
    assert said["state"] == "failed" and said["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("end", ["succeeded", "cancelled"])
def test_a_job_that_ends_while_it_is_told_of_is_not_half_over(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    until(lambda: not served.service.unfinished)
    progress = Job.progress
    with held() as free:
        path = f"/v1/jobs/{submit(http)['id']}"
        (job,) = served.service.unfinished

        def ended(job: Job) -> dict[str, Any]:
            if end == "cancelled":
                job.cancel()
            free.set()
            assert job.wait(60)
            return dict(progress.fget(job))  # type: ignore[attr-defined]

        with monkeypatch.context() as patch:
            patch.setattr(Job, "progress", property(ended))
            answer = http.get(path)
        said = answer.json()
        assert said["state"] == "queued" and (said["data"], said["error"], said["finished"]) == ([], None, None)
        assert answer.headers["retry-after"] == "1" and not job.fetched
    said = http.get(path).json()
    assert said["state"] == end and bool(said["data"]) == (end == "succeeded") and job.fetched


def test_previews_come_in_their_order_and_before_their_picture() -> None:
    """Whichever is encoded first."""
    job, heard = Job(Work({"prompt": "x", "num_images_per_prompt": 2}), "one", (64, 64), 60.0), list[Event]()
    job.listen(heard.append)
    for index, number in ((0, 1), (0, 0), (1, 0), (0, 2), (0, 2)):
        job.previewed(index, number, Picture(b"%d %d" % (index, number), PREVIEW))
    assert job.preview is not None and job.preview.data == b"0 2"
    job.pictured(0, Picture(b"0", PREVIEW))
    job.previewed(0, 3, Picture(b"0 3", PREVIEW))
    told = [each.picture.data for each in heard if isinstance(each, Previewed | Pictured)]
    assert told == [b"0 1", b"1 0", b"0 2", b"0"]
    assert job.preview.data == b"1 0"  # of the image that is still on its way
    job.pictured(1, Picture(b"1", PREVIEW))
    assert job.preview is None


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_the_events_of_a_job(served: Served, http: httpx2.Client) -> None:
    with held() as free:
        job = submit(http, partial_images=2, num_inference_steps=6)
        path = f"/v1/jobs/{job['id']}/events"
        with http.stream("GET", path) as gone:
            assert next(events(gone.iter_lines()))[0] == "job.state"
        with http.stream("GET", path) as stream:
            found = events(stream.iter_lines())
            assert next(found)[1]["state"] == "queued"  # nobody's going away has cancelled it
            free.set()
            heard = list(found)
    names = [name for name, _ in heard]
    assert names[-1] == "job.succeeded" and names.count("job.image") == 1
    assert set(names) <= {"job.progress", "job.preview", "job.image", "job.succeeded"}
    steps = [said["steps"] for name, said in heard if name == "job.progress"]
    assert steps == sorted(steps) and all(said["total_steps"] == 6 for name, said in heard if name == "job.progress")
    url = next(said["url"] for name, said in heard if name == "job.image")
    assert http.get(url).status_code == 200
    with http.stream("GET", path) as late:
        assert [name for name, _ in events(late.iter_lines())] == ["job.state", "job.image", "job.succeeded"]


def test_a_preview_is_there_while_a_picture_is_drawn(served: Served, http: httpx2.Client) -> None:
    job = submit(http, partial_images=3, num_inference_steps=100)
    answer = until(lambda: (found := http.get(f"/v1/jobs/{job['id']}/images/preview")).status_code == 200 and found)
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    http.post(f"/v1/jobs/{job['id']}/cancel")
    assert http.get(f"/v1/jobs/{job['id']}/images/preview").status_code == 404


def test_jobs_belong_to_the_key_that_made_them() -> None:
    paths = (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("POST", "/cancel"), ("DELETE", ""))
    with (
        Served(http=HttpSettings(keys=("one", "two"))) as served,
        served.http(headers={"x-api-key": "one"}) as one,
        served.http(headers={"x-api-key": "two"}) as two,
    ):
        job = submit(one, {"idempotency-key": "same"})
        assert [each["id"] for each in one.get("/v1/jobs").json()["data"]] == [job["id"]]
        assert two.get("/v1/jobs").json()["data"] == []
        for method, path in paths:
            answer = two.request(method, f"/v1/jobs/{job['id']}{path}")
            assert (answer.status_code, error_of(answer)["code"]) == (404, "job_not_found")
        assert submit(two, {"idempotency-key": "same"})["id"] != job["id"]
        assert done(one, job["id"])["state"] == "succeeded"


def test_a_server_that_goes_waits_for_clients_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with Served() as served, served.http() as http, ThreadPoolExecutor() as pool:
        fetched, left = submit(http), submit(http)
        until(lambda: not served.service.unfinished)
        monkeypatch.setattr("latentrt.runtime.service.service.PATIENCE", 60.0)
        drained = pool.submit(served.service.drain, 60.0)
        until(lambda: served.service.state == "draining")
        assert http.get(f"/v1/jobs/{fetched['id']}").json()["state"] == "succeeded"
        assert wait([drained], 0.2).not_done
        served.service.store.find("", left["id"]).asked -= 100  # nobody has asked for the other one for a while
        assert drained.result() is True
        assert http.get(f"/v1/jobs/{left['id']}").json()["state"] == "succeeded"


def test_a_server_that_goes_waits_for_clients_that_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hear of the end, and fetch what they do not have, as the page does."""
    monkeypatch.setattr("latentrt.runtime.service.service.PATIENCE", 60.0)
    with Served() as served, served.http() as http, ThreadPoolExecutor() as pool, held() as free:
        path = f"/v1/jobs/{submit(http, n=2)['id']}"
        (job,) = served.service.unfinished
        with http.stream("GET", f"{path}/events") as stream:
            found = events(stream.iter_lines())
            assert next(found)[1]["state"] == "queued"
            job.asked -= 100  # it takes long
            drained = pool.submit(served.service.drain, 60.0)
            until(lambda: served.service.state == "draining")
            free.set()
            for name, said in found:
                if name == "job.image" and said["index"] == 0:
                    assert http.get(said["url"]).status_code == 200
        assert name == "job.succeeded" and not job.fetched and wait([drained], 0.2).not_done
        assert http.get(f"{path}/images/preview").status_code == 404 and not job.fetched
        assert http.get(f"{path}/images/1").status_code == 200
        assert job.fetched and drained.result() is True


def test_who_hears_of_a_cancelled_job_has_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with Served() as served, served.http() as http, held() as free:
        path = f"/v1/jobs/{submit(http, n=2)['id']}"
        (job,) = served.service.unfinished
        with http.stream("GET", f"{path}/events") as stream:
            found = events(stream.iter_lines())
            next(found)
            assert http.post(f"{path}/cancel").status_code == 200
            free.set()
            assert [name for name, _ in found][-1] == "job.cancelled"
        job.pictures.setdefault(0, None)  # type: ignore[arg-type]  # one was drawn before
        with http.stream("GET", f"{path}/events") as stream:
            list(events(stream.iter_lines()))
        assert job.fetched


def test_results_expire() -> None:
    with Served(results_seconds=0.05) as served, served.http() as http:
        job = submit(http, {"idempotency-key": "again"})
        until(lambda: http.get(f"/v1/jobs/{job['id']}").status_code == 404)
        assert submit(http, {"idempotency-key": "again"})["id"] != job["id"]


def test_results_take_so_much_memory_and_no_more() -> None:
    """As the store counts them; `test_kept.py` looks at what is alive."""
    with Served(results_bytes=15_000) as served, served.http() as http:
        ids = [submit(http, n=1, seed=seed)["id"] for seed in range(4)]
        for id in ids:
            until(lambda: (said := http.get(f"/v1/jobs/{id}")).status_code == 404 or said.json()["finished"])  # noqa: B023
        kept = [id for id in ids if http.get(f"/v1/jobs/{id}").status_code == 200]
        assert 0 < len(kept) < 4
        assert served.service.store.sweep() <= 15_000


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models"])
def test_listings(http: httpx2.Client, path: str) -> None:
    assert http.get(path).json()["object"] == "list"
