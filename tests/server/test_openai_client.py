"""The official client, unmodified, against a real server."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx2
import numpy as np
import openai
import pytest
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.server.body import _urlencoded
from latentrt.runtime.service import Job, Service
from PIL import Image

from .conftest import FEW, Served, error_of, held, picture, png, until

SMALL: dict[str, Any] = {"model": "embedded", "prompt": "a red circle", "size": "64x64"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1) as opened:
        yield opened


def far(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_pictures_are_those_of_the_pipeline(client: openai.OpenAI, pipe: Pipeline) -> None:
    answer = client.images.generate(**SMALL, n=3, extra_body={**FEW, "sampler": "euler_a", "negative_prompt": "blue"})
    sizes: dict[str, Any] = {"height": 64, "width": 64, "num_images_per_prompt": 3}
    expected = pipe("a red circle", "blue", sampler="euler_a", **FEW, **sizes)
    assert [each.model_extra["seed"] for each in answer.data] == expected.seeds == [7, 8, 9]
    pairs = zip(answer.data, expected.images, strict=True)
    assert max(far(picture(each.b64_json), image) for each, image in pairs) <= 1


def test_the_answer_says_where_the_time_went_and_what_made_it(client: openai.OpenAI) -> None:
    answer = client.images.generate(**SMALL, extra_body=FEW)
    said = answer.model_extra
    assert {"tokenize", "encode", "prepare", "denoise", "decode", "encode_image", "total"} <= set(said["timings"])
    assert said["timings"]["total"] >= said["timings"]["denoise"] > 0
    assert said["timings"]["steps"] == 4 and said["parameters"]["num_inference_steps"] == 4
    assert len(said["bundle"]) == 64 and said["request_id"] == answer._request_id
    assert (answer.size, answer.output_format, said["model"]) == ("64x64", "png", "embedded")


@pytest.mark.parametrize(("asked", "found"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client: openai.OpenAI, asked: Any, found: str) -> None:
    best = client.images.generate(**SMALL, output_format=asked, output_compression=100, extra_body=FEW)
    image = picture(best.data[0].b64_json)
    assert (image.format, image.size, best.output_format) == (found, (64, 64), asked)
    worst = client.images.generate(**SMALL, output_format=asked, output_compression=0, extra_body=FEW)
    shorter = len(worst.data[0].b64_json) < len(best.data[0].b64_json)
    assert shorter == (asked != "png") and (best.model_extra["ignored"] == []) == (asked != "png")


def test_fields_that_mean_nothing_here_are_named(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        **SMALL, quality="high", style="vivid", user="me", background="opaque", moderation="low", extra_body=FEW
    )
    assert sorted(answer.model_extra["ignored"]) == ["background", "moderation", "quality", "style", "user"]


def test_the_default_size_and_auto_are_the_one_that_is_served(client: openai.OpenAI) -> None:
    for given in ({}, {"size": "auto"}):
        answer = client.images.generate(model="embedded", prompt="a star", extra_body=FEW, **given)
        assert answer.size == "128x128" == "{}x{}".format(*picture(answer.data[0].b64_json).size)


def test_a_stream_shows_pictures_on_their_way(client: openai.OpenAI) -> None:
    whole = client.images.generate(**SMALL, n=2, extra_body=FEW)
    stream = client.images.generate(**SMALL, n=2, stream=True, partial_images=2, extra_body=FEW)
    events = list(stream)
    partial = [each for each in events if each.type == "image_generation.partial_image"]
    completed = [each for each in events if each.type == "image_generation.completed"]
    assert len(partial) + len(completed) == len(events) and len(completed) == 2
    for index in (0, 1):
        mine = [each for each in partial if each.model_extra["index"] == index]
        assert [each.partial_image_index for each in mine] == [0, 1][: len(mine)]
        assert all(picture(each.b64_json).size == (64, 64) for each in mine)
    by_seed = {each.model_extra["seed"]: each.b64_json for each in completed}
    assert {each.model_extra["seed"] for each in whole.data} == set(by_seed) == {7, 8}
    assert max(far(picture(by_seed[e.model_extra["seed"]]), picture(e.b64_json)) for e in whole.data) <= 1
    assert completed[-1].model_extra["timings"]["steps"] == 8
    assert completed[-1].size == "64x64" and completed[-1].usage.total_tokens == 0


def test_an_edit_repaints_what_is_transparent(client: openai.OpenAI, pipe: Pipeline) -> None:
    before = Image.effect_noise((64, 64), 80).convert("RGB")
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:, 32:, 3] = 0  # the right half is repainted
    extra = {**FEW, "strength": 1.0}
    answer = client.images.edit(
        model="embedded",
        prompt="a star",
        image=("in.png", png(before)),
        mask=("mask.png", png(Image.fromarray(mask))),
        extra_body=extra,
    )
    white = Image.fromarray(255 - mask[..., 3])
    expected = pipe("a star", image=before, mask_image=white, **extra).images[0]
    drawn = picture(answer.data[0].b64_json)
    assert far(drawn, expected) <= 1
    opposite = pipe("a star", image=before, mask_image=Image.fromarray(mask[..., 3]), **extra).images[0]
    assert far(drawn, opposite) > 20


def test_an_edit_takes_a_mask_of_black_and_white_and_one_picture_in_a_list(
    client: openai.OpenAI, pipe: Pipeline
) -> None:
    before, white = Image.effect_noise((64, 64), 80).convert("RGB"), Image.new("L", (64, 64), 0)
    white.paste(255, (0, 0, 64, 32))
    opaque = Image.merge("RGBA", (white, white, white, Image.new("L", (64, 64), 255)))
    expected = pipe("a star", image=before, mask_image=white, strength=0.9, **FEW).images[0]
    for mask in (white, opaque):
        answer = client.images.edit(
            model="embedded",
            prompt="a star",
            image=[("in.png", png(before))],
            mask=("mask.png", png(mask)),
            extra_body={**FEW, "strength": 0.9},
        )
        assert far(picture(answer.data[0].b64_json), expected) <= 1


def test_an_edit_takes_lists_and_objects_as_the_client_writes_them(client: openai.OpenAI, pipe: Pipeline) -> None:
    before = Image.effect_noise((64, 64), 80).convert("RGB")
    extra: dict[str, Any] = {"seed": [9, 5], "num_inference_steps": 4, "strength": 0.9, "guidance_interval": [0.1, 1]}
    sent = extra | {"svg": {"model": "a", "x": [1]}}
    answer = client.images.edit(model="embedded", prompt="a star", image=png(before), n=2, extra_body=sent)
    assert answer.model_extra["ignored"] == ["svg"]
    expected = pipe("a star", image=before, num_images_per_prompt=2, **extra)
    assert [each.model_extra["seed"] for each in answer.data] == expected.seeds == [9, 5]
    pairs = zip(answer.data, expected.images, strict=True)
    assert max(far(picture(each.b64_json), image) for each, image in pairs) <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": [9, "x"]},
        {"seed": [-1]},
        {"seed": ["007"]},
        {"sigmas": ["nan"]},
        {"sigmas": ["[" * 50_000]},
        {"eta": [1]},
        {"other": [1]},
    ],
)
def test_lists_of_a_form_are_checked_as_those_of_json(
    client: openai.OpenAI, http: httpx2.Client, fields: dict[str, Any]
) -> None:
    before = png(Image.new("RGB", (64, 64)))
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(prompt="a star", image=before, extra_body=fields)
    body = {"prompt": "a star", "image": base64.b64encode(before).decode(), **fields}
    assert refused.value.body == error_of(http.post("/v1/images/edits", json=body))


def test_a_form_has_room_for_a_picture_as_text(http: httpx2.Client) -> None:
    text = base64.b64encode(png(Image.effect_noise((1200, 1000), 90))).decode()
    assert len(text) > 1 << 20
    fields = {"prompt": "a star", "size": "64x64", "num_inference_steps": "2", "image": text}
    for form in ({"files": {name: (None, value) for name, value in fields.items()}}, {"data": fields}):
        answer = http.post("/v1/images/edits", **form)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text[:300]


def test_urlencoded_forms_are_read_as_pythons_own_are() -> None:
    form = urlencode({"prompt": "ü+ %&=\n" * 5000, "mask": ""}) + "&n&&size=%zz%4&seed=1=2&style=%ff"
    assert _urlencoded(form.encode()).multi_items() == parse_qsl(form, keep_blank_values=True)


def test_an_edit_streams_events_of_its_own(client: openai.OpenAI) -> None:
    before = png(Image.new("RGB", (64, 64), "red"))
    stream = client.images.edit(
        model="embedded",
        prompt="a star",
        image=before,
        stream=True,
        partial_images=1,
        extra_body={**FEW, "strength": 0.8},
    )
    kinds = [event.type for event in stream]
    assert kinds[-1] == "image_edit.completed" and set(kinds[:-1]) <= {"image_edit.partial_image"}


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    model = client.models.retrieve("embedded")
    said = model.model_extra
    assert listed.id == model.id == "embedded" and model.owned_by == "latentrt" and said["state"] == "ready"
    assert said["tasks"] == ["text-to-image", "image-to-image", "inpainting"] and said["sizes"] == ["64x64"]
    assert "dpmpp_2m" in said["samplers"] and said["limits"]["n"] == 10 and said["defaults"]["size"] == "128x128"


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="greater than") as bad:
        client.images.generate(**SMALL, n=0)
    assert (bad.value.code, bad.value.param, bad.value.type) == ("invalid_request", "n", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="choose embedded") as missing:
        client.images.generate(model="dall-e-2", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")
    with pytest.raises(openai.BadRequestError, match="no picture is stored") as url:
        client.images.generate(**SMALL, response_format="url")
    assert url.value.param == "response_format"


def test_a_queue_that_is_full_is_tried_again_by_the_client() -> None:
    with Served(slots=1, max_waiting=1) as served, served.openai(max_retries=2) as client, held() as free:
        first = threading.Thread(target=client.images.generate, kwargs={**SMALL, "extra_body": FEW})
        first.start()
        until(lambda: served.service.unfinished)
        with pytest.raises(openai.RateLimitError) as full, served.openai() as impatient:
            impatient.images.generate(**SMALL, extra_body=FEW)
        assert full.value.code == "queue_full" and full.value.type == "rate_limit_error"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 120
        assert 100 <= int(full.value.response.headers["retry-after-ms"]) <= 120_000
        threading.Timer(0.2, free.set).start()
        assert client.images.generate(**SMALL, extra_body=FEW).data  # once what was there is drawn
        first.join()


def test_a_client_that_times_out_leaves_nothing_behind(served: Served) -> None:
    with held(), served.openai(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(**SMALL, extra_body=FEW)
        until(lambda: not served.service.unfinished)
    (model,) = served.service.models
    assert model.batcher is not None
    until(lambda: (model.batcher.waiting, model.batcher.running) == (0, 0))  # type: ignore[union-attr]


def test_closing_a_stream_cancels_it(served: Served, client: openai.OpenAI) -> None:
    with held():
        stream = client.images.generate(**SMALL, stream=True, extra_body=FEW)
        (job,) = served.service.unfinished
        stream.close()
        until(lambda: job.state == "cancelled")


def test_an_error_in_a_stream_is_raised_by_the_client(served: Served, client: openai.OpenAI) -> None:
    with held() as free:
        patience = 1.0  # more than it may be said to take
        stream = client.images.generate(**SMALL, stream=True, extra_body={**FEW, "timeout": patience})
        time.sleep(patience + 0.1)
        free.set()
        with pytest.raises(openai.APIError, match="in time") as late:
            list(stream)
    assert late.value.code == "deadline_exceeded"


def test_a_stream_of_a_request_that_is_over_already(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Service.submit

    def slow(service: Service, *given: Any, **named: Any) -> Job:
        job = submit(service, *given, **named)
        assert job.wait(60)  # before anybody listens
        return job

    monkeypatch.setattr(Service, "submit", slow)
    events = list(client.images.generate(**SMALL, n=2, stream=True, extra_body=FEW))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert {event.model_extra["seed"] for event in events} == {7, 8}
