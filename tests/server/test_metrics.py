"""What Prometheus reads: every number that is promised, and the dashboard and alerts that use them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tokenizers
from latentrt.engines.errors import DeadlineError, EngineError, QueueFullError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.server import Metrics
from latentrt.runtime.service import Job, Work
from latentrt.runtime.service.errors import BusyError, UnavailableError
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Served, generate, held, until

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "deploy" / "monitoring"
HISTOGRAM = ("_bucket", "_sum", "_count")


def metrics(http: httpx2.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    """Return the sum of the samples of a name that have these labels."""
    wanted = set(labels.items())
    return sum(number for (each, own), number in found.items() if each == name and wanted <= set(own))


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[Served, httpx2.Client]]:
    """A server that has drawn, refused and cancelled."""
    with Served() as served, served.http() as http:
        for fields in ({"n": 2}, {"prompt": "many words " * 100}, {"n": 0}, {"model": "nothing"}):
            generate(http, **fields)
        with held() as free:
            ids = [http.post("/v1/jobs", json={"prompt": "x", "size": "64x64"}).json()["id"] for _ in range(3)]
            waiting = metrics(http)
            assert (
                value(waiting, "latentrt_queue_images", model="embedded")
                + value(waiting, "latentrt_running_images", model="embedded")
                == 3
            )
            assert value(waiting, "latentrt_jobs_unfinished") == 3
            for id in ids:
                http.post(f"/v1/jobs/{id}/cancel")
            free.set()
        until(lambda: value(metrics(http), "latentrt_cancellations_total") == 3)
        yield served, http


def test_counts_are_those_of_what_was_done(busy: tuple[Served, httpx2.Client]) -> None:
    http = busy[1]
    found = metrics(http)
    expected = {
        ("latentrt_requests_total", "succeeded"): 2,
        ("latentrt_requests_total", "cancelled"): 3,
        ("latentrt_requests_total", "failed"): 0,
    }
    for (name, outcome), number in expected.items():
        assert value(found, name, outcome=outcome) == number, (name, outcome)
    assert value(found, "latentrt_images_total", model="embedded") == 3
    assert value(found, "latentrt_request_seconds_count", task="generation") == 2
    assert value(found, "latentrt_stage_seconds_count", stage="denoise") == 2
    assert value(found, "latentrt_queue_wait_seconds_count") == value(found, "latentrt_admissions_total") >= 3
    assert value(found, "latentrt_rejections_total", reason="invalid_request") == 1
    assert value(found, "latentrt_rejections_total", reason="model_not_found") == 1
    tokenizer = tokenizers.Tokenizer.from_file(str(ensure_bundle() / "tokenizer.json"))
    tokens = len(tokenizer.encode("many words " * 100, add_special_tokens=False).ids)
    assert value(found, "latentrt_tokens_cut_total", model="embedded") == tokens - 75 > 100
    assert value(found, "latentrt_http_requests_total", route="/v1/images/generations", status="200") == 2
    assert value(found, "latentrt_http_requests_total", route="/v1/images/generations", status="400") == 1
    assert value(found, "latentrt_state", state="ready") == 1 and value(found, "latentrt_state") == 1


def test_steps_and_rows_add_up(busy: tuple[Served, httpx2.Client]) -> None:
    found = metrics(busy[1])
    used, run, wasted = (value(found, f"latentrt_rows_{name}_total") for name in ("used", "run", "wasted"))
    assert 0 < used <= run == used + wasted
    assert value(found, "latentrt_step_seconds_count") == value(found, "latentrt_steps_total") > 0
    assert value(found, "latentrt_queue_images") == value(found, "latentrt_running_images") == 0


def test_the_server_says_what_it_holds(busy: tuple[Served, httpx2.Client]) -> None:
    found = metrics(busy[1])
    assert value(found, "latentrt_model_loaded", model="embedded") == 1
    assert value(found, "latentrt_model_loads_total", outcome="succeeded") == 1
    assert value(found, "latentrt_model_load_seconds") > 0 and value(found, "latentrt_model_bytes") > 1e6
    assert value(found, "latentrt_tensor_bytes") > 0 and value(found, "process_resident_memory_bytes") > 0


def test_memory_is_told_by_graph(busy: tuple[Served, httpx2.Client]) -> None:
    found, bundle = metrics(busy[1]), ensure_bundle()
    named = {dict(labels)["graph"] for name, labels in found if name == "latentrt_memory_bytes"}
    assert named == {"text_encoder", "denoiser", "step", "decoder", "image_encoder"}
    for graph in named:
        weights = value(found, "latentrt_memory_bytes", graph=graph, kind="weights")
        assert weights == (bundle / f"{graph}.onnx").stat().st_size
    buffers = {name: value(found, "latentrt_memory_bytes", graph=name, kind="buffers") for name in named}
    assert buffers["decoder"] > 64 * 64 * 3 and buffers["denoiser"] > 0 and buffers["text_encoder"] > 0
    assert sum(buffers.values()) == value(found, "latentrt_tensor_bytes", model="embedded")
    assert value(found, "latentrt_model_bytes") >= value(found, "latentrt_memory_bytes")  # as it was when it was opened


def test_the_first_buckets_of_requests_are_short(busy: tuple[Served, httpx2.Client]) -> None:
    found = metrics(busy[1])
    for name in ("request_seconds", "queue_wait_seconds"):
        bounds = sorted(float(dict(labels)["le"]) for (each, labels) in found if each == f"latentrt_{name}_bucket")
        assert bounds[0] == 0.005


def test_the_last_buckets_hold_a_processors_times(busy: tuple[Served, httpx2.Client]) -> None:
    """FLUX.1 takes 16 s a step on one, and two minutes of steps."""
    found = metrics(busy[1])
    for name in ("step_seconds", "stage_seconds", "request_seconds"):
        bounds = {float(dict(labels)["le"]) for (each, labels) in found if each == f"latentrt_{name}_bucket"}
        assert {25.0, 60.0, 120.0} <= bounds, name


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:latentrt|process)_[a-z_]+", text))


def known(found: dict[Any, float]) -> set[str]:
    return {name for name, _ in found}


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml"])
def test_every_metric_that_is_used_exists(busy: tuple[Served, httpx2.Client], file: str) -> None:
    found = metrics(busy[1])
    used = names_in((MONITORING / file).read_text(encoding="utf-8"))
    assert used and used - known(found) == set()


def test_labels_that_are_used_exist(busy: tuple[Served, httpx2.Client]) -> None:
    found = metrics(busy[1])
    text = (MONITORING / "grafana.json").read_text(encoding="utf-8") + (MONITORING / "alerts.yml").read_text()
    own: dict[str, set[str]] = {}
    for name, labels in found:
        own.setdefault(name, {"instance", "job", "le"}).update(label for label, _ in labels)
    checked = 0
    for name, inside in re.findall(r"\b(latentrt_[a-z_]+)\{([^}]*)\}", text.replace('\\"', '"')):
        for label in re.findall(r"(\w+)\s*=", inside):
            if name in own:
                assert label in own[name], (name, label)
                checked += 1
    assert checked > 40


def test_the_dashboard_shows_every_metric_of_ours(busy: tuple[Served, httpx2.Client]) -> None:
    shown = names_in((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    quiet = {"latentrt_slots", "latentrt_rows", "latentrt_model_bytes", "latentrt_model_load_seconds"}
    quiet |= {"latentrt_steps_total", "latentrt_tokens_cut_total", "latentrt_http_request_seconds_bucket"}
    quiet |= {"latentrt_model_loads_total"}
    ours = {name for name in known(metrics(busy[1])) if name.startswith("latentrt_")}
    ours = {name for name in ours if not name.endswith(("_sum", "_count", "_created"))}
    assert ours - shown == quiet


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    assert board["title"] == "latentrt" and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)  # no panel lies on another


def test_what_the_web_uis_api_refuses_is_counted(served: Served, http: httpx2.Client) -> None:
    def refused() -> list[float]:
        found = metrics(http)
        return [value(found, "latentrt_rejections_total", reason=code) for code in ("invalid_request", "not_found")]

    before = refused()
    assert http.post("/sdapi/v1/txt2img", json={"enable_hr": True}).status_code == 400
    assert http.get("/sdapi/v1/nothing").status_code == 404
    until(lambda: refused() == [count + 1 for count in before])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RequestError("no"), "refused"),
        (QueueFullError("no"), "refused"),
        (BusyError("no room", "model_not_loaded", 10.0), "refused"),
        (UnavailableError("it goes", "draining", 5.0), "refused"),
        (DeadlineError("cannot be", 3.0), "refused"),
        (DeadlineError("too late"), "late"),
        (UnavailableError("it hangs", "failed", 10.0), "failed"),
        (UnavailableError("it went", "replica_lost"), "failed"),
        (EngineError("it broke"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_what_is_turned_away_in_health_is_no_failure(error: Exception, outcome: str) -> None:
    job, counted = Job(Work({"prompt": "x"}), "one", (64, 64), 60.0), Metrics()
    assert job.end("failed", error)
    counted.ended(job)
    found = re.findall(r'latentrt_requests_total{.*outcome="(\w+)".*} 1.0', counted.text().decode())
    assert found == [outcome]


def test_metrics_of_two_apps_do_not_meet(served: Served) -> None:
    with Served() as other, other.http() as http, served.http() as mine:
        before = value(metrics(http), "latentrt_images_total")
        generate(mine)
        assert value(metrics(http), "latentrt_images_total") == before == 0
