"""The documentation of the server: its programs run, and it explains every metric, error, field and path there is."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx2
import pytest
from latentrt.runtime.server import metrics
from latentrt.runtime.server.schema import IGNORED, JobBody

from .conftest import Served, error_of

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SOURCES = [*(ROOT / "runtime" / "server").glob("*.py"), *(ROOT / "runtime" / "service").glob("*.py")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_programs_run_as_printed(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    client, embedded = blocks("python")
    names: dict[str, Any] = {}
    exec(client.replace("http://127.0.0.1:8000", served.url), names)
    assert [image.model_extra["seed"] for image in names["answer"].data] == [1, 2]
    assert names["answer"].model_extra["parameters"]["num_inference_steps"] == 10
    names["client"].close()
    exec(embedded, names)
    assert names["job"].state == "succeeded" and names["png"].startswith(b"\x89PNG")


def test_the_job_of_the_page_is_taken(http: httpx2.Client) -> None:
    (command,) = [block for block in blocks("sh") if "curl" in block]
    words = shlex.split(command)
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    answer = http.post("/v1/jobs", content=words[words.index("-d") + 1].encode(), headers=headers)
    assert answer.status_code == 202
    http.post(f"/v1/jobs/{answer.json()['id']}/cancel")


MAKERS = {"ApiError": 2, "BusyError": 1, "NotFoundError": 2, "RefusedError": 2, "UnavailableError": 1, "_too_many": 1}
"""What makes errors, and which of its arguments is the code."""


def codes() -> set[str]:
    found = {
        "invalid_request",
        "not_found",
        "method_not_allowed",
        "client_gone",
    }  # defaults, and those of the framework
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in MAKERS and len(node.args) > MAKERS[name]:
                code = node.args[MAKERS[name]]
                found |= {code.value} if isinstance(code, ast.Constant) else set()
    return found


def test_every_error_is_explained() -> None:
    section = PAGE.partition("## Errors")[2].partition("## Limits")[0]
    assert len(codes()) > 25 and codes() - set(re.findall(r"`([a-z_]+)`", section)) == set()


def test_every_metric_is_explained() -> None:
    section = PAGE.partition("## Metrics")[2]
    counters = {f"{name}_total" for name in (*metrics.COUNTERS, *metrics.COUNTED)}
    ours = counters | set(metrics.GAUGES) | set(metrics.HISTOGRAMS) | set(metrics.NOTED)
    ours |= {
        "state",
        "connections",
        "jobs_unfinished",
        "results_bytes",
        "model_loaded",
        "model_bytes",
        "memory_bytes",
        "model_requests",
    }
    assert ours - set(re.findall(r"`([a-z_]+)`", section)) == set()


def test_every_field_is_explained_or_an_argument_of_the_pipeline() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    like = {"prompt_3", "negative_prompt_2", "negative_prompt_3", "padding_mask_crop", "clip_skip"}
    assert set(JobBody.model_fields) - named - like - set(IGNORED) == set()


def test_every_path_is_there(http: httpx2.Client) -> None:
    said = set(http.get("/openapi.json").json()["paths"])
    named = set(re.findall(r"`(?:[A-Z]+ )?(/[\w/{}.]+)`", PAGE)) - {"/openapi.json"}
    named = {path for path in named if not path.startswith("/sdapi")}  # which has tests of its own
    same = {"/v1/models/{id}": "/v1/models/{name}", "/v1/jobs/{id}/images/{n}": "/v1/jobs/{id}/images/{number}"}
    assert {same.get(path, path) for path in named} - said == set()
    ours = {path for path in said if not path.startswith(("/sdapi", "/app_id", "/user")) and path != "/"}
    assert ours - {same.get(path, path) for path in named} == set()


def test_an_unknown_field_is_what_the_page_says(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", content=json.dumps({"prompt": "x", "colour": "red"}).encode())
    assert error_of(answer)["code"] == "unknown_field"
