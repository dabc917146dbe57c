"""What is refused before anything is drawn: fields, bodies, limits, keys, paths; always OpenAI's error object."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.runtime.request import GenerationRequest
from latentrt.runtime.sdapi.fields import TextToImage
from latentrt.runtime.server import HttpSettings
from latentrt.runtime.server.schema import PASSED, Edit, Generation, JobBody
from latentrt.runtime.service import Limits
from PIL import Image

from .conftest import FEW, Served, error_of, generate, png

SQUARE = base64.b64encode(png(Image.new("RGB", (64, 64), "red"))).decode()


ONE_FIELD = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--'


def animation() -> str:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": ["a", "b"]}, "prompt", "string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "integer"),
        ({"n": "2"}, "n", "integer"),
        ({"n": 11}, "n", "at most 10"),
        ({"n": 10**30}, "n", "1024"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x70"}, "size", "multiple of 8"),
        ({"size": "0x64"}, "size", "multiple of 8"),
        ({"size": "999999x999999"}, "size", "at most 17 Mpixels"),
        ({"size": "136x128"}, "size", "at most 16384 pixels are drawn, such as 128x128"),
        ({"size": 64}, "size", "string"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"seed": [1, 2]}, "seed", "one for each of the 1 images"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1"),
        ({"num_inference_steps": 151}, "num_inference_steps", "at most 150"),
        ({"timesteps": [3.0] * 151, "num_inference_steps": None}, "timesteps", "at most 150"),
        ({"guidance_interval": [0.5, 0.2]}, "guidance_interval", "ends before it starts"),
        ({"guidance_interval": [0.5]}, "guidance_interval", "give at least 2, not 1"),
        ({"guidance_interval": [0.1, 0.2, 0.3]}, "guidance_interval", "give at most 2, not 3"),
        ({"guidance_interval": 0.5}, "guidance_interval", "give a list"),
        ({"sigmas": [1.0] * 1001}, "sigmas", "give at most 1000, not 1001"),
        ({"guidance_reuse": 2}, "guidance_reuse", "less than or equal to 1"),
        ({"decoder": "tiny"}, "decoder", "export the checkpoint again with --tiny-decoder"),
        ({"decoder": "small"}, "decoder", "'full' or 'tiny'"),
        ({"tiled": "yes"}, "tiled", "boolean"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"sampler": "euler_z"}, "sampler", "not known"),
        ({"eta": 2}, "eta", "less than or equal to 1"),
        ({"forecast": "tomorrow"}, "forecast", "taylor"),
        ({"prompt_syntax": "mine"}, "prompt_syntax", "a1111"),
        ({"strength": 0.5}, "strength", "no field"),
        ({"clip_skip": 2}, "clip_skip", "not supported"),
        ({"output_format": "gif"}, "output_format", "webp"),
        ({"output_compression": 101}, "output_compression", "100"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"partial_images": 4, "stream": True}, "partial_images", "at most 3"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"timeout": 601}, "timeout", "at most 600"),
        ({"model": "nothing"}, "model", "choose embedded"),
        ({"steps": 4}, "steps", "no field"),
        ({"prompt": "x" * 10_001}, "prompt", "at most 10000"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt", "at most 10000"),
        ({"prompt_2": "x"}, "prompt_2", "nothing that reads it"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_fields(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    response = generate(http, **fields)
    assert response.status_code == (404 if "model" in fields else 400), response.text
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and said in error["message"], error


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"image": None}, "image", "missing"),
        ({"image": "https://example.com/a.png"}, "image", "nothing is fetched"),
        ({"image": "data:image/png,xx"}, "image", "base64"),
        ({"image": "!"}, "image", "base64"),
        ({"image": ""}, "image", "missing"),
        ({"image": base64.b64encode(b"no picture").decode()}, "image", "cannot be read"),
        ({"image": SQUARE[:80]}, "image", "cannot be read"),
        ({"image": [SQUARE, SQUARE]}, "image", "give one"),
        ({"image": animation()}, "image", "2 frames"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, "image", "PNG, JPEG or WebP"),
        ({"mask": "AAAA"}, "mask", "cannot be read"),
        ({"strength": 0}, "strength", "greater than 0"),
        ({"padding_mask_crop": -1, "mask": SQUARE}, "padding_mask_crop", "0 or more"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_fields_of_edits(http: httpx2.Client, fields: dict[str, Any], param: str, said: str) -> None:
    given = {"prompt": "x", "image": SQUARE, **FEW, **fields}
    for path in ("/v1/images/edits", "/v1/jobs"):
        if fields in ({"image": None}, {"image": ""}) and path == "/v1/jobs":
            continue  # a job without a picture is a generation
        response = http.post(path, json={name: value for name, value in given.items() if value is not None})
        assert response.status_code == 400, response.text
        error = error_of(response)
        assert error["param"] == param and said in error["message"], error


LEFT_OUT = {"height", "width", "num_images_per_prompt", "denoising_start", "denoising_end"}
"""Fields of a request that have other names here, or start from latents."""


NULLABLE = (
    *("background", "input_fidelity", "mask", "model", "moderation", "n", "output_compression", "output_format"),
    *("partial_images", "quality", "response_format", "size", "stream", "style"),
)
"""Of OpenAI's generations and edits, after their reference."""


def test_what_openai_lets_be_null_may_be_null(http: httpx2.Client) -> None:
    for path, more in (("/v1/images/generations", {}), ("/v1/images/edits", {"image": SQUARE}), ("/v1/jobs", {})):
        schema = Generation if path == "/v1/images/generations" else Edit
        nothing = dict.fromkeys(set(NULLABLE) & set(schema.model_fields))
        answer = http.post(path, json={"prompt": "x", **FEW, **more, **nothing})
        assert answer.status_code == (202 if path == "/v1/jobs" else 200), answer.text
        assert answer.json()["ignored"] == [] and (path == "/v1/jobs" or len(answer.json()["data"]) == 1)


def test_a_body_of_many_values_is_not_read(http: httpx2.Client) -> None:
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/jobs", "/sdapi/v1/txt2img", "/sdapi/v1/options"):
        body = b'{"prompt": "x", "svg": [' + b"[]," * 200_000 + b"[]]}"
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "more than 100000 values" in answer.text


def test_bodies_are_read_beside_the_event_loop(http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set[str]()
    validate = ("model_validate_json", "model_validate_strings")
    reads = [(schema, name, getattr(schema, name)) for schema in (Edit, JobBody, TextToImage) for name in validate]
    for schema, name, read in reads:

        def noted(*given: Any, read: Any = read) -> Any:
            threads.add(threading.current_thread().name.rpartition("_")[0])
            return read(*given)

        monkeypatch.setattr(schema, name, noted)
    for path in ("/v1/images/edits", "/v1/jobs", "/sdapi/v1/txt2img"):
        assert http.post(path, json={"prompt": "x", "n": 0, "steps": 0}).status_code == 400
    assert http.post("/v1/images/edits", data={"prompt": "x", "n": "0"}).status_code == 400
    assert threads == {"latentrt requests"}


def test_every_field_of_a_request_can_be_asked_for() -> None:
    of_sizes = {name for name in GenerationRequest.model_fields if name.endswith(("_size", "_top_left", "_score"))}
    assert set(GenerationRequest.model_fields) - LEFT_OUT - of_sizes == set(PASSED) & set(
        GenerationRequest.model_fields
    ) | {"prompt"}


def test_a_request_of_too_much_work() -> None:
    limits = Limits(work=0.1)
    with Served(limits=limits) as served, served.http() as http:
        assert generate(http, n=2, num_inference_steps=12).status_code == 200
        answer = generate(http, n=2, num_inference_steps=13)
        assert answer.status_code == 400 and error_of(answer)["param"] == "n"
        assert "0.1065 megapixel steps: at most 0.1 " in error_of(answer)["message"]


def test_an_edit_of_a_large_picture_is_drawn_at_a_size_that_is_served(http: httpx2.Client) -> None:
    large = base64.b64encode(png(Image.new("RGB", (640, 320), "red"))).decode()
    answer = http.post("/v1/images/edits", json={"prompt": "x", "image": large, "strength": 0.5, **FEW})
    assert answer.json()["size"] == "176x88"


def test_an_edit_of_a_narrow_picture_is_drawn_with_no_more_pixels(http: httpx2.Client) -> None:
    """Its short side is made as long as the network needs, and its long one is not cut."""

    def edited(size: tuple[int, int], path: str = "/v1/images/edits") -> httpx2.Response:
        image = base64.b64encode(png(Image.new("RGB", size, "red"))).decode()
        return http.post(path, json={"prompt": "x", "image": image, "strength": 0.5, **FEW})

    assert edited((8, 2048)).json()["size"] == "8x2048"
    for path in ("/v1/images/edits", "/v1/jobs"):
        for size in ((1, 100_000), (100_000, 1)):
            error = error_of(answer := edited(size, path))
            assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_size", "image")
            assert "at most 16384 pixels are drawn" in error["message"]


def test_a_picture_of_many_pixels_is_not_decoded(http: httpx2.Client) -> None:
    bomb = base64.b64encode(png(Image.new("1", (9000, 9000)))).decode()
    assert len(bomb) < 20_000
    response = http.post("/v1/images/edits", json={"prompt": "x", "image": bomb})
    assert response.status_code == 400 and "Mpixels" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"", "application/json", 400, "no JSON"),
        (b"[1]", "application/json", 400, "object"),
        (b'"text"', "application/json", 400, "object"),
        (b"\xff\xfe", "application/json", 400, "no JSON"),
        (b"[" * 100_000, "application/json", 400, "no JSON"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "no JSON"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "application/json", 400, "finite"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', "application/json", 400, "finite"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "application/json"),
        (b"<x/>", "application/xml", 415, "application/json"),
        (b"--x\r\n", "multipart/form-data; boundary=x", 415, "application/json"),
    ],
)
def test_bodies(http: httpx2.Client, body: bytes, kind: str, status: int, said: str) -> None:
    response = http.post("/v1/images/generations", content=body, headers={"content-type": kind})
    assert response.status_code == status and said in error_of(response)["message"], response.text


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"garbage", "multipart/form-data; boundary=x", "no form"),
        (b"garbage", "multipart/form-data", "boundary"),
        (
            b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--',
            "multipart/form-data; boundary=x",
            "image",
        ),
        (b"prompt=x&prompt=y", "application/x-www-form-urlencoded", "twice"),
        (b"&".join(b"f%d=1" % i for i in range(2000)), "application/x-www-form-urlencoded", "field"),
    ],
)
def test_forms(http: httpx2.Client, body: bytes, kind: str, said: str) -> None:
    response = http.post("/v1/images/edits", content=body, headers={"content-type": kind})
    message = error_of(response)["message"].lower()
    assert response.status_code == 400 and any(word in message for word in said.split("|")), response.text


def test_files_where_texts_belong_and_pictures_twice(http: httpx2.Client) -> None:
    file = ("a.png", base64.b64decode(SQUARE), "image/png")
    for files, param in (
        ([("prompt", file), ("image", file)], "prompt"),
        ([("image", file), ("image[]", file)], "image"),
        ([("image[]", file), ("image[]", file)], "image"),
    ):
        response = http.post("/v1/images/edits", data={} if param == "prompt" else {"prompt": "x"}, files=files)
        assert response.status_code == 400 and error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("GET", "/v1/jobs/nothing", 404, "job_not_found"),
        ("POST", "/v1/jobs/nothing/cancel", 404, "job_not_found"),
        ("GET", "/v1/jobs/nothing/events", 404, "job_not_found"),
        ("GET", "/v1/jobs/nothing/images/0", 404, "job_not_found"),
        ("DELETE", "/v1/jobs/nothing", 404, "job_not_found"),
        ("PATCH", "/v1/models", 405, "method_not_allowed"),
        ("BREW", "/v1/models", 400, "invalid_http"),
        ("GET", "/v1/jobs/%00%ff", 404, "job_not_found"),
        ("GET", "/v1/jobs/x/images/%2e%2e%2f", 404, "not_found"),
    ],
)
def test_paths(http: httpx2.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    http = HttpSettings(keys=("first-key", "second-key"), max_body=20_000)
    with Served(
        sizes=((64, 64), (64, 128)), sizes_only=True, http=http, limits=Limits(unfinished=1, images=2)
    ) as served:
        yield served


def test_keys(guarded: Served) -> None:
    with guarded.http() as http:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer first-key-"},
            {"x-api-key": "x"},
        ):
            for path in ("/v1/models", "/nothing"):
                response = http.get(path, headers=headers)
                error = error_of(response)
                assert (response.status_code, error["code"]) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"].startswith("Bearer") and "first" not in error["message"]
        for path in ("/health", "/v2/health/ready", "/v2/health/live", "/metrics", "/version", "/openapi.json"):
            assert http.get(path).status_code == 200
        for headers in ({"authorization": "Bearer first-key"}, {"x-api-key": "second-key"}):
            assert http.get("/v1/models", headers=headers).status_code == 200


def test_a_wrong_key_is_answered_before_the_body_is_read(guarded: Served) -> None:
    with guarded.http() as http:
        response = http.post("/v1/images/generations", content=b"{", headers={"content-length": "1"})
        assert response.status_code == 401


def test_bodies_that_are_too_large(guarded: Served) -> None:
    with guarded.http(headers={"x-api-key": "first-key"}) as http:
        announced = generate(http, user="x" * 21_000)
        chunked = http.post(
            "/v1/images/generations",
            content=iter([b"x" * 4096] * 10),
            headers={"content-type": "application/json"},
        )
        for response in (announced, chunked):
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        assert generate(http).status_code == 200


def test_sizes_that_are_not_served(guarded: Served) -> None:
    with guarded.http(headers={"x-api-key": "first-key"}) as http:
        response = generate(http, size="128x128")
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_size", "size")
        assert "64x64, 64x128" in error["message"]
        assert generate(http, size=None).json()["size"] == "64x64"
        tall = base64.b64encode(png(Image.new("RGB", (30, 64)))).decode()
        edited = http.post("/v1/images/edits", json={"prompt": "x", "image": tall, "strength": 0.5, **FEW})
        assert edited.json()["size"] == "64x128"  # the nearest shape
        assert http.get("/v1/models/embedded").json()["other_sizes"] is False


def test_probes_may_ask_for_a_head(http: httpx2.Client) -> None:
    for path in ("/health", "/v2/health/ready", "/v2/health/live"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_no_message_names_a_folder_of_the_server(served: Served, http: httpx2.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(Bundle, "has_graph", lambda bundle, name: name != "image_encoder")
    answer = http.post("/v1/images/edits", json={"prompt": "x", "image": SQUARE, "strength": 0.5})
    path = str(served.service.models.find(None).bundle.path)
    assert answer.status_code == 400 and path not in answer.text
    assert "model embedded has no image_encoder" in error_of(answer)["message"]


def test_cors_is_off_unless_asked_for(served: Served) -> None:
    asked = {"origin": "https://example.com", "access-control-request-method": "POST"}
    with served.http() as http:
        assert "access-control-allow-origin" not in http.options("/v1/models", headers=asked).headers
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=asked).headers


def test_cors_when_asked_for() -> None:
    http_settings = HttpSettings(keys=("k",), cors_origins=("https://example.com",))
    with Served(http=http_settings) as served, served.http() as http:
        asked = {"origin": "https://example.com", "access-control-request-method": "POST"}
        leave = http.options("/v1/images/generations", headers=asked)
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == "https://example.com"
        assert http.get("/v1/models", headers=asked).headers["access-control-allow-origin"] == "https://example.com"
        other = http.get("/v1/models", headers={**asked, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
