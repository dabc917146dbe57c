"""A real Ray on this machine: two replicas of the embedded model behind the ingress, killed under load.

In a virtual environment of its own (700 MB):

    pip install 'ray[serve]' 'latentrt[cpu,serve]' openai psutil pytest
    python -m pytest -m slow tests/ray/test_cluster.py -s  # says figures
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.ray.settings import RaySettings
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ray = pytest.importorskip("ray", reason="needs ray[serve]")
serve = pytest.importorskip("ray.serve", reason="needs ray[serve]")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

PORT = 18500
URL = f"http://127.0.0.1:{PORT}"
FEW: dict[str, Any] = {"num_inference_steps": 20}
SETTINGS: dict[str, Any] = {
    "bundles": [f"embedded={ensure_bundle()}"],
    "max_images": 4,
    "backend": "onnxruntime-cpu",
    "sizes": ["64x64"],
    "slots": 4,
    "max_waiting": 4,
    "max_queued": 6,
    "fixed_rows": True,
}
say = print


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.05)
    return found


def replicas(name: str = "Engine") -> list[Any]:
    """Return the processes of a deployment's replicas."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"ServeReplica:latentrt:{name}" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def megabytes() -> dict[str, int]:
    """Return the resident memory of all processes of Ray on this machine."""
    memory: Counter[str] = Counter()
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        words = process.info["cmdline"] or [""]
        if any("/ray/" in word for word in words[:3]) or words[0].startswith("ray::"):
            name = words[0].split(":")[-1].strip() if words[0].startswith("ray::ServeReplica") else "Ray itself"
            memory[name] += process.info["memory_info"].rss >> 20
    return dict(memory)


def deploy(**settings: Any) -> None:
    from latentrt.runtime.ray.app import build

    serve.run(build(RaySettings(**{**SETTINGS, **settings})), name="latentrt", route_prefix="/")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # sockets have short paths
        began = time.perf_counter()
        ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20, _temp_dir=folder
        )
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        say(f"\nRay was up after {time.perf_counter() - began:.1f} s")
        yield
        began = time.perf_counter()
        serve.shutdown()
        ray.shutdown()
        say(f"and down after {time.perf_counter() - began:.1f} s")


@pytest.fixture(scope="module")
def client(cluster: None) -> Iterator[Any]:
    began = time.perf_counter()
    deploy(min_replicas=2, max_replicas=2)
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        until(lambda: _ready(client))
        say(f"two replicas were deployed after {time.perf_counter() - began:.1f} s, MiB {megabytes()}")
        yield client


def _ready(client: Any) -> bool:
    try:
        client.get("/../v2/health/ready", cast_to=object)
    except openai.APIError:
        return False
    return True


def image_of(result: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result.data[0].b64_json)))).astype(int)


def draw(client: Any, seed: int = 1, **fields: Any) -> np.ndarray[Any, Any]:
    said = {**FEW, "seed": seed, **fields}
    return image_of(client.images.generate(prompt="a red circle", model="embedded", size="64x64", extra_body=said))


def outcome(client: Any, seed: int, **fields: Any) -> tuple[int, str, Any]:
    """Return status, code and picture of a request; an answer that is in another shape is an error."""
    try:
        return 200, "", draw(client, seed, **fields)
    except openai.APIStatusError as error:
        assert error.response.headers["content-type"] == "application/json", error.response.text[:200]
        assert error.body["message"] and error.response.headers["retry-after"]
        return error.status_code, str(error.code), None


def burst(
    client: Any, count: int, meanwhile: Callable[[], None] = lambda: None, every: float = 0.0
) -> list[tuple[int, str, Any]]:
    """Send requests, one `every` so many seconds: more at once than may be queued are turned away unseen."""
    with ThreadPoolExecutor(count) as pool:
        asked = []
        for seed in range(count):
            asked.append(pool.submit(outcome, client, seed))
            time.sleep(every)
        meanwhile()
        return [each.result() for each in asked]


def test_a_picture_comes_as_from_one_machine(client: Any) -> None:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as pipe:
        reference = pipe("a red circle", width=64, height=64, num_inference_steps=20, seed=3).images[0]
        assert abs(draw(client, 3) - np.asarray(reference).astype(int)).max() <= 1
        times: dict[str, list[float]] = {"pipe": [], "Ray": []}
        for _ in range(20):
            for name, call in {
                "pipe": lambda: pipe("a red circle", width=64, height=64, num_inference_steps=4, seed=3),
                "Ray": lambda: draw(client, 3, num_inference_steps=4),
            }.items():
                began = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - began))
    say({name: f"{statistics.median(each):.1f} ms p50 for 4 steps" for name, each in times.items()})


def test_errors_have_openais_shape(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="width is 63: this bundle needs a multiple of 8"):
        client.images.generate(prompt="x", size="63x64")
    with pytest.raises(openai.BadRequestError, match="sampler 'nonsense' is not known"):
        draw(client, sampler="nonsense")


def test_a_stream_has_previews(client: Any) -> None:
    events = [
        event.type
        for event in client.images.generate(
            prompt="a red circle", size="64x64", stream=True, partial_images=2, extra_body=FEW
        )
    ]
    assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_thirty_at_once_are_drawn_or_told_to_come_again(client: Any) -> None:
    began = time.perf_counter()
    found = Counter((status, code) for status, code, _ in burst(client, 30))
    say(f"thirty at once, 2 × 4 slots, 14 may wait: {dict(found)} in {time.perf_counter() - began:.1f} s")
    assert set(found) <= {(200, ""), (429, "queue_full")} and found[200, ""] >= 8


def test_the_ingress_shows_what_each_replica_is_at(client: Any) -> None:
    def shown(name: str) -> dict[str, float]:
        text = client.get("/../metrics", cast_to=str)
        return {
            replica: float(value)
            for replica, value in re.findall(rf'^latentrt_{name}{{model="embedded",replica="(.+)"}} (\S+)$', text, re.M)
        }

    before = sum(shown("admissions_total").values())
    drawn = sum(status == 200 for status, _, _ in burst(client, 12))
    found = shown("admissions_total")
    say(f"admissions by replica: {found}")
    assert len(found) == 2 and sum(found.values()) == before + drawn
    assert set(shown("queue_images").values()) == {0.0} and set(shown("slots").values()) == {4.0}


def test_a_client_that_goes_frees_its_slots(client: Any) -> None:
    handle = serve.get_deployment_handle("Engine", "latentrt")

    def told() -> dict[str, Any]:
        """Return the figures of both replicas, whichever of them answers."""
        found: dict[str, Any] = {}
        while len(found) < 2:
            said = handle.told.remote().result()
            found[said.replica] = said.figures["embedded"]
        return found

    def cancelled() -> float:
        return sum(figures.counts["cancellations"] for figures in told().values())

    before = cancelled()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(
            prompt="long", size="64x64", n=4, extra_body={"num_inference_steps": 150}
        )
    began = time.perf_counter()
    until(lambda: not any(each.gauges["running_images"] + each.gauges["queue_images"] for each in told().values()))
    say(f"its slots were free {time.perf_counter() - began:.2f} s later")
    until(lambda: cancelled() == before + 1)  # it was not drawn to its end


def test_a_replica_that_is_killed_costs_no_request(client: Any) -> None:
    alone = {seed: draw(client, seed) for seed in range(10)}

    def kill() -> None:
        replicas()[0].send_signal(signal.SIGKILL)

    began = time.perf_counter()
    found = burst(client, 10, kill, every=0.03)
    say(f"kill -9 with 10 in flight: {Counter(each[:2] for each in found)} in {time.perf_counter() - began:.1f} s")
    assert [status for status, _, _ in found] == [200] * 10
    assert all((picture == alone[seed]).all() for seed, (_, _, picture) in enumerate(found))
    until(lambda: len(replicas()) == 2)
    say(f"two replicas again after {time.perf_counter() - began:.1f} s")
    assert [outcome(client, seed)[0] for seed in range(4)] == [200] * 4


def test_a_replica_whose_device_fails_costs_no_request(client: Any) -> None:
    """Until Ray has ended it, it is the emptiest, and refuses what comes."""
    alone = {seed: draw(client, seed) for seed in range(10)}

    def names() -> set[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in actors if "latentrt#Engine#" in actor["name"]}

    def fails(replica: Any) -> None:
        """Let the engine of a replica see that its device fails."""
        with contextlib.suppress(Exception):
            replica._replica_impl._user_callable_wrapper.user_callable._fail("as a test wants it")

    name = min(names())
    failing = ray.get_actor(name, "serve").__ray_call__
    began = time.perf_counter()
    found = burst(client, 10, lambda: ray.get(failing.remote(fails)), every=0.03)
    outcomes = Counter(each[:2] for each in found)
    say(f"a device that fails with 10 in flight: {outcomes} in {time.perf_counter() - began:.1f} s")
    assert [status for status, _, _ in found] == [200] * 10
    assert all((picture == alone[seed]).all() for seed, (_, _, picture) in enumerate(found))
    until(lambda: len(names() - {name}) == 2)
    say(f"two good replicas again after {time.perf_counter() - began:.1f} s")


def test_all_replicas_killed_at_once(client: Any) -> None:
    def kill() -> None:
        time.sleep(0.4)
        for process in replicas():
            process.send_signal(signal.SIGKILL)

    began = time.perf_counter()
    found = Counter(each[:2] for each in burst(client, 10, kill))
    say(f"kill -9 of both with 10 in flight: {dict(found)} in {time.perf_counter() - began:.1f} s")
    assert set(found) <= {(200, ""), (429, "queue_full"), (503, "replica_lost"), (503, "unavailable")}
    until(lambda: len(replicas()) == 2)
    assert until(lambda: outcome(client, 1)[0] == 200)


def test_a_stream_goes_on_when_its_replica_is_killed(client: Any) -> None:
    events: list[Any] = []
    stream = client.images.generate(
        prompt="a red circle", size="64x64", stream=True, partial_images=2, extra_body={"num_inference_steps": 120}
    )
    killer = threading.Timer(0.8, lambda: [process.kill() for process in replicas()[:2]])
    killer.start()
    for event in stream:
        events.append(event.type)
    say(f"a stream whose replicas were killed: {Counter(events)}")
    assert events[-1] == "image_generation.completed"
    until(lambda: len(replicas()) == 2)


def test_replicas_come_with_work_and_go_without(cluster: None) -> None:
    deploy(min_replicas=1, max_replicas=2, queue_seconds=0.5, upscale_delay=1.0, downscale_delay=3.0, max_queued=64)
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        until(lambda: len(replicas()) == 1 and _ready(client), 120)
        began, stop = time.perf_counter(), threading.Event()

        def load(seed: int) -> list[int]:
            found = []
            while not stop.is_set():
                found.append(outcome(client, seed, num_inference_steps=100)[0])
            return found

        with ThreadPoolExecutor(16) as pool:
            loads = [pool.submit(load, seed) for seed in range(16)]
            try:
                until(lambda: len(replicas()) == 2, 90)
                say(f"a second replica after {time.perf_counter() - began:.1f} s of load")
                time.sleep(3)
            finally:
                stop.set()
            statuses = Counter(status for each in loads for status in each.result())
        began = time.perf_counter()
        until(lambda: len(replicas()) == 1, 120)
        say(f"it went {time.perf_counter() - began:.1f} s after the load; answers {dict(statuses)}")
        assert set(statuses) == {200}


def test_the_ingress_is_the_one_that_may_not_die(client: Any) -> None:
    """Says what a client gets then, which is Ray's: documented, and not promised."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(draw(client, num_inference_steps=100).shape)
        except openai.APIError as error:
            found.append((type(error).__name__, getattr(error, "status_code", None), str(error)[:80]))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.4)
    os.kill(replicas("Ingress")[0].pid, signal.SIGKILL)
    thread.join()
    began = time.perf_counter()
    until(lambda: _ready(client))
    say(f"the ingress killed: {found}; ready again {time.perf_counter() - began:.1f} s later")
