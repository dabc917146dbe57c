"""Requests of every kind of wrong: never a 500, always OpenAI's error object, and nothing left behind."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentrt.runtime.server.schema import Edit, Generation
from latentrt.runtime.service import Limits
from PIL import Image

from .conftest import Served, error_of, png, until

PIXEL = base64.b64encode(png(Image.new("RGB", (16, 16), "red"))).decode()

numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.5, 1e308, -0.0, 5e-324]),
)
sizes = st.one_of(
    st.sampled_from(
        ["auto", "64x64", "16x16", "8x8", "0x0", "64X64", "64 x 64", "1x1000000000", "8192x8192", "-8x8", "8x"]
    ),
    st.from_regex(r"[0-9]{1,12}[xX×*][0-9]{1,12}", fullmatch=True),
    st.text(max_size=12),
)
texts = st.one_of(st.text(max_size=40), st.sampled_from(["", "\x00", "x" * 3000, "((a:1.2)", "🦊" * 300, "a\nb"]))
things = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, sizes),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
likely: dict[str, st.SearchStrategy[Any]] = {
    "prompt": texts,
    "size": sizes,
    "n": st.integers(-1, 3),
    "seed": st.one_of(numbers, st.lists(numbers, max_size=3)),
    "num_inference_steps": st.integers(-1, 5),
    "model": st.sampled_from(["embedded", "", "nothing", None]),
    "sampler": st.sampled_from(["euler", "dpmpp_2m_karras", "lcm", "flow_euler", "DDIMScheduler", "x", "", "pndm"]),
    "guidance_scale": numbers,
    "timesteps": st.lists(numbers, max_size=4),
    "sigmas": st.lists(numbers, max_size=4),
    "image": st.sampled_from([PIXEL, f"data:image/png;base64,{PIXEL}", "", "AAAA", "http://x/y", [PIXEL], [], "€"]),
    "mask": st.sampled_from([PIXEL, "", "AAAA", None]),
    "strength": numbers,
    "padding_mask_crop": st.integers(-1, 20),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif", None]),
    "output_compression": st.integers(-1, 101),
    "partial_images": st.integers(-1, 5),
    "response_format": st.sampled_from(["b64_json", "url", None]),
    "prompt_syntax": st.sampled_from(["a1111", "compel", "x"]),
    "forecast": st.sampled_from(["taylor", "spectrum", "x", ""]),
    "eta": numbers,
    "timeout": st.floats(-1, 30),
}
names = st.one_of(st.sampled_from(sorted(likely)), st.sampled_from(sorted(Edit.model_fields)), st.text(max_size=10))


RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=40),
    "negative_prompt": st.text(max_size=40),
    "size": st.sampled_from(["64x64", "16x16", "8x64", "auto", None]),
    "n": st.integers(1, 2),
    "seed": st.integers(0, 2**64 - 1) | st.none(),
    "num_inference_steps": st.integers(1, 4),
    "sampler": st.sampled_from(["euler", "euler_a", "dpmpp_2m_karras", "lcm", "pndm", "heun", "unipc", "ddim"]),
    "guidance_scale": st.floats(0, 30),
    "timesteps": st.lists(st.integers(0, 999).map(float), min_size=1, max_size=4),
    "sigmas": st.lists(st.floats(0, 20), min_size=1, max_size=4),
    "image": st.just(PIXEL),
    "mask": st.just(PIXEL),
    "strength": st.floats(0.01, 1),
    "padding_mask_crop": st.integers(0, 20),
    "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    "output_compression": st.integers(0, 100),
    "partial_images": st.integers(0, 3),
    "prompt_syntax": st.sampled_from(["a1111", "compel"]),
    "forecast": st.sampled_from(["taylor", "spectrum"]),
    "eta": st.floats(0, 1),
    "quality": st.text(max_size=5),
}
"""Values that are right by themselves, if not always with others."""


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of which most are right, some near to it, and a few are anything."""
    body: dict[str, Any] = {"prompt": "x", "size": "64x64", "num_inference_steps": 1}
    for name in draw(st.lists(st.sampled_from(sorted(RIGHT)), max_size=5, unique=True)):
        body[name] = draw(RIGHT[name])
    for name in draw(st.lists(names, max_size=draw(st.sampled_from([0, 0, 1, 3])))):
        body[name] = draw(likely.get(name, things) if draw(st.integers(0, 3)) else things)
    body.pop("stream", None)
    return body


@pytest.fixture(scope="module")
def frugal() -> Iterator[Served]:
    with Served(limits=Limits(images=2, steps=4, work=0.05, prompt=2000, timeout=20)) as served:
        yield served
        until(lambda: not served.service.unfinished)


@pytest.fixture(scope="module")
def http(frugal: Served) -> Iterator[httpx2.Client]:
    with frugal.http() as client:
        yield client


REFUSED = (400, 404, 408, 413, 415, 422, 429)


def check(answer: httpx2.Response) -> None:
    if answer.status_code in REFUSED or answer.status_code == 504:
        assert error_of(answer)["code"]
    else:
        assert answer.status_code in (200, 202), answer.text


def ask(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    check(answer)
    if answer.status_code == 202:
        http.delete(f"/v1/jobs/{answer.json()['id']}")


PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/jobs")
quietly = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(quietly, max_examples=60)
@given(path=st.sampled_from(PATHS), body=bodies())
def test_fields(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    ask(http, path, body)


@settings(quietly, max_examples=30)
@given(
    path=st.sampled_from(PATHS),
    body=st.one_of(st.binary(max_size=200), things.map(lambda thing: json.dumps(thing).encode())),
    kind=st.sampled_from(
        [
            "application/json",
            "multipart/form-data; boundary=x",
            "application/x-www-form-urlencoded",
            "text/plain",
            "",
            "€",
        ]
    ),
)
def test_bodies(http: httpx2.Client, path: str, body: bytes, kind: str) -> None:
    check(http.post(path, content=body, headers={"content-type": kind.encode()}))


@settings(quietly, max_examples=30)
@given(
    fields=st.dictionaries(names, st.one_of(texts, sizes, numbers.map(str)), max_size=5), file=st.binary(max_size=60)
)
def test_forms(http: httpx2.Client, fields: dict[str, str], file: bytes) -> None:
    files = {"image": ("a.png", file or base64.b64decode(PIXEL), "image/png")}
    data = {"prompt": "x", "size": "64x64", "num_inference_steps": "1", **fields}
    data = {name: text for name, text in data.items() if name not in ("image", "stream")}
    check(http.post("/v1/images/edits", data=data, files=files))


@settings(quietly, max_examples=30)
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH"]),
    path=st.sampled_from(["/v1/jobs/", "/v1/models/", "/v1/", "/v1/jobs/x/images/", "/"]),
    rest=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_characters="?#"), max_size=30),
)
def test_paths(http: httpx2.Client, method: str, path: str, rest: str) -> None:
    answer = http.request(method, path + rest)
    assert answer.status_code in (200, 204, 400, 404, 405), answer.text


def test_sizes_beyond_all_bounds(http: httpx2.Client) -> None:
    """A fuzzer does not find these by itself."""
    for size in ("1000000000x1000000000", "8x999999", "999999x8", "99999999x8", "8192x8192", "64x64x64", "0x0", "x"):
        answer = http.post("/v1/images/generations", json={"prompt": "x", "size": size})
        assert answer.status_code == 400 and error_of(answer)["param"] in ("size", "n"), answer.text


def test_the_schema_has_every_field(http: httpx2.Client) -> None:
    said = http.get("/openapi.json").json()["paths"]
    for path, schema in (("generations", Generation), ("edits", Edit)):
        content = said[f"/v1/images/{path}"]["post"]["requestBody"]["content"]
        assert set(content["application/json"]["schema"]["properties"]) == set(schema.model_fields)


@pytest.mark.slow
def test_a_thousand_and_more(http: httpx2.Client, frugal: Served) -> None:
    count = 0

    @settings(quietly, max_examples=1200, derandomize=False)
    @given(path=st.sampled_from(PATHS), body=bodies())
    def run(path: str, body: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        ask(http, path, body)

    run()
    assert count >= 1000
    until(lambda: not frugal.service.unfinished)


@pytest.mark.slow
def test_what_schemathesis_makes_of_the_schema(frugal: Served, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    config = tmp_path / "schemathesis.toml"  # 504: a request may give no time at all
    config.write_text('[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "504"]\n')
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", str(config), "run"]
    command += [f"{frugal.url}/openapi.json", "--max-examples", "60", "--checks", checks]
    command += ["--exclude-path-regex", "^/sdapi", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found and int(found[1]) >= 1000
    until(lambda: not frugal.service.unfinished)
