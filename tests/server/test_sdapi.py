"""The web UI's API over HTTP, asked as its clients ask: webuiapi itself, Open WebUI and SillyTavern as they do."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from latentrt.runtime.sdapi import routes
from latentrt.runtime.sdapi.settings import Settings
from latentrt.runtime.server import HttpSettings
from latentrt.runtime.service import Limits, Service
from PIL import Image

from ..conftest import calls_held
from .conftest import Served, generate, held, opening_held, picture, png, until
from .test_sdapi_fields import SILLY_TAVERN

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 4, "seed": 7}
KEY = "sk-of-one"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    from latentrt.engines.bundle import Bundle
    from latentrt.export.embedded import ensure_bundle

    bundle = Bundle.open(ensure_bundle())
    with Served(
        {"first": bundle, "second": bundle}, limits=Limits(images=12), aliases={"dall-e-2": "first"}
    ) as running:
        yield running
        until(lambda: not running.service.unfinished)


def txt2img(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    return http.post("/sdapi/v1/txt2img", json={"prompt": "a red circle", **SMALL, **fields})


def pictures(answer: httpx2.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text[:500]
    return [picture(text) for text in answer.json()["images"]]


def info(answer: httpx2.Response) -> dict[str, Any]:
    return dict(json.loads(answer.json()["info"]))


def refused(answer: httpx2.Response, status: int) -> str:
    """Return the text of an error, which has the web UI's shape."""
    said = answer.json()
    assert answer.status_code == status and set(said) == {"error", "detail", "body", "errors"}
    assert said["detail"] == said["errors"] and "\n" not in said["detail"]
    return str(said["detail"])


def test_a_picture_is_that_of_the_other_api(http: httpx2.Client) -> None:
    fields = {
        "sampler_name": "DPM++ 2M Karras",
        "cfg_scale": 5,
        "negative_prompt": "blue",
        "batch_size": 2,
        "n_iter": 2,
    }
    answer = txt2img(http, **fields)
    drawn = pictures(answer)
    ours = {"sampler": "dpmpp_2m_karras", "guidance_scale": 5, "negative_prompt": "blue", "n": 4}
    expected = [picture(each["b64_json"]) for each in generate(http, **ours, prompt_syntax="a1111").json()["data"]]
    for mine, other in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1
    said = info(answer)
    assert said["all_seeds"] == [7, 8, 9, 10] and said["seed"] == 7 and said["steps"] == 4
    assert said["sampler_name"] == "DPM++ 2M" and said["sd_model_name"] == "first" and said["interrupted"] is False
    text = said["infotexts"][1]
    assert text.startswith("a red circle\nNegative prompt: blue\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras, ")
    assert "CFG scale: 5, Seed: 8, Size: 64x64, " in text
    assert answer.json()["parameters"]["prompt"] == "a red circle"


def test_weights_in_prompts_are_read(http: httpx2.Client) -> None:
    plain, weighted = (pictures(txt2img(http, prompt=text))[0] for text in ("a red circle", "a (red:1.6) circle"))
    assert np.abs(np.asarray(plain, int) - np.asarray(weighted, int)).max() > 8
    assert "lora" in refused(txt2img(http, prompt="a cat <lora:film:1>"), 400)


def test_any_seed_is_told_and_draws_the_same_again(http: httpx2.Client) -> None:
    first, second = (txt2img(http, seed=-1) for _ in range(2))
    seed = info(first)["seed"]
    assert 0 <= seed < 2**32 and seed != info(second)["seed"]
    assert txt2img(http, seed=seed).json()["images"] == first.json()["images"]


def test_images_may_be_left_out_or_be_of_another_kind(http: httpx2.Client) -> None:
    assert pictures(txt2img(http, send_images=False)) == []
    answer = txt2img(http, override_settings={"samples_format": "jpg", "jpeg_quality": 50})
    assert pictures(answer)[0].format == "JPEG"
    assert pictures(txt2img(http))[0].format == "PNG"


def test_overrides_without_a_meaning_are_named(http: httpx2.Client) -> None:
    overrides = {"samples_format": "png", "sd_vae": "other.pt", "eta_noise_seed_delta": 31337, "samples_save": False}
    said = info(txt2img(http, override_settings=overrides))
    assert said["ignored"] == ["override_settings.sd_vae", "override_settings.eta_noise_seed_delta"]
    options = http.get("/sdapi/v1/options").json()
    assert info(txt2img(http, override_settings=options))["ignored"] == []
    assert info(txt2img(http, override_settings={"sd_vae": "None", "sd_unet": "None"}))["ignored"] == []
    assert http.post("/sdapi/v1/options", json={"eta_noise_seed_delta": 31337}).status_code == 200
    assert info(txt2img(http))["ignored"] == []


def test_options_leave_those_that_are_set_meanwhile(served: Served, http: httpx2.Client) -> None:
    model = served.service.models.find("second")
    model.close(model.taken())
    with ThreadPoolExecutor(1) as pool:
        with opening_held() as free:
            choosing = pool.submit(http.post, "/sdapi/v1/options", json={"sd_model_checkpoint": "second"})
            assert free.reached.wait(60)
            assert http.post("/sdapi/v1/options", json={"jpeg_quality": 50}).status_code == 200
            free.set()
            assert choosing.result().status_code == 200
        overrides = {
            "override_settings": {"sd_model_checkpoint": "first"},
            "override_settings_restore_afterwards": False,
        }
        with calls_held(Settings, "ignored") as free:
            drawing = pool.submit(txt2img, http, **overrides)
            assert free.reached.wait(60)
            said = http.get("/sdapi/v1/options").json()
            assert said["sd_model_checkpoint"].startswith("second [") and said["jpeg_quality"] == 50
            assert http.post("/sdapi/v1/options", json={"jpeg_quality": 95}).status_code == 200
            free.set()
            assert len(pictures(drawing.result())) == 1
    said = http.get("/sdapi/v1/options").json()
    assert said["sd_model_checkpoint"].startswith("first [") and said["jpeg_quality"] == 95


def test_img2img_starts_from_a_picture(http: httpx2.Client) -> None:
    start = Image.new("RGB", (96, 64), (200, 30, 30))
    url = "data:image/png;base64," + base64.b64encode(png(start)).decode()
    fields = {"prompt": "a red circle", "init_images": [url], "denoising_strength": 0.5, "steps": 4, "seed": 3}
    answer = http.post("/sdapi/v1/img2img", json=fields)
    drawn = pictures(answer)[0]
    edit = {"image": url, "strength": 0.5, "prompt_syntax": "a1111", "num_inference_steps": 4, "seed": 3}
    other = http.post("/v1/images/edits", json={"prompt": "a red circle", **edit}).json()["data"][0]["b64_json"]
    assert drawn.size == (96, 64) and np.abs(np.asarray(drawn, int) - np.asarray(picture(other), int)).max() <= 1
    assert answer.json()["parameters"]["init_images"] is None and info(answer)["denoising_strength"] == 0.5
    assert http.post("/sdapi/v1/img2img", json=fields | {"include_init_images": True}).json()["parameters"][
        "init_images"
    ] == [url]
    for size, mode in (((64, 64), 1), ((64, 64), 2), ((64, 96), 0)):
        sized = {"width": size[0], "height": size[1], "resize_mode": mode}
        assert pictures(http.post("/sdapi/v1/img2img", json=fields | sized))[0].size == size
    assert "init_images is 0 pictures" in refused(
        http.post("/sdapi/v1/img2img", json={**fields, "init_images": []}), 400
    )
    wrong = http.post("/sdapi/v1/img2img", json={**fields, "denoising_strength": 0})
    assert refused(wrong, 400).startswith("denoising_strength is 0")


@pytest.mark.parametrize("full", [False, True])
def test_what_is_not_masked_stays_as_it_is(http: httpx2.Client, full: bool) -> None:
    """The web UI pastes what was drawn into the picture, with the mask's edge softened by mask_blur."""
    start, mask = Image.effect_noise((64, 64), 40).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    texts = [base64.b64encode(png(each)).decode() for each in (start, mask)]
    fields = {"prompt": "a red circle", "init_images": texts[:1], "mask": texts[1], "denoising_strength": 1, **SMALL}
    fields |= {"inpaint_full_res": full, "inpaint_full_res_padding": 8}

    def moved(**more: Any) -> np.ndarray:
        drawn = pictures(http.post("/sdapi/v1/img2img", json=fields | more))[0]
        return np.abs(np.asarray(drawn, int) - np.asarray(start, int)).max(axis=(0, 2))

    for fill in (0, 1):
        sharp = moved(mask_blur=0, inpainting_fill=fill)
        assert sharp[:32].max() == 0 and sharp[32:].min() > 16
    assert moved(mask_blur=0, inpainting_mask_invert=1)[32:].max() == 0
    around, there = (moved(inpainting_fill=fill, denoising_strength=0.5) for fill in (0, 1))
    assert (around != there).any()
    soft = moved()
    assert soft[:16].max() == 0 and soft[28:32].max() > 0 and soft[36:].min() > 16


def test_the_python_client(served: Served) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(baseurl=f"{served.url}/sdapi/v1", sampler="Euler a", steps=4)
    result = api.txt2img(prompt="a red circle", width=64, height=64, seed=5, batch_size=2)
    assert [each.size for each in result.images] == [(64, 64)] * 2 and result.info["all_seeds"] == [5, 6]
    again = api.img2img(images=[result.image], prompt="a blue star", width=64, height=64, seed=5)
    assert again.image.size == (64, 64)
    mask = Image.new("L", (64, 64), 255)
    assert api.img2img(images=[result.image], mask_image=mask, prompt="a star", width=64, height=64).image
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(api.util_get_scheduler_names())
    assert api.util_get_current_model() == api.util_get_model_names()[0]
    api.util_set_model("second")
    assert api.util_get_current_model().startswith("second [")
    assert api.txt2img(prompt="a", width=64, height=64).info["sd_model_name"] == "second"
    api.util_set_model("first")
    api.util_wait_for_ready(0.1)
    for ask in (api.get_upscalers, api.get_latent_upscale_modes, api.get_loras, api.get_embeddings, api.get_scripts):
        ask()
    for ask in (
        api.get_sd_vae,
        api.get_hypernetworks,
        api.get_face_restorers,
        api.get_prompt_styles,
        api.get_cmd_flags,
    ):
        ask()
    assert api.get_memory()["ram"]["used"] > 0 and api.refresh_checkpoints() is None and api.interrupt() == {}
    with pytest.raises(RuntimeError, match=r"400.*enable_hr is not supported"):
        api.txt2img(prompt="a", enable_hr=True)


def test_open_webui_with_this_engine(http: httpx2.Client) -> None:
    """What its server sends: no key is an empty user, models are chosen in the options, all of which come back."""
    headers = {"authorization": "Basic"}  # with a blank behind it, which no client lets through to its end
    models = http.get("/sdapi/v1/sd-models", headers=headers).json()
    listed = [{"id": model["title"], "name": model["model_name"]} for model in models]
    assert [each["name"] for each in listed] == ["first", "second"]
    for model in (listed[1]["id"], listed[0]["id"]):
        options = http.get("/sdapi/v1/options", headers=headers).json()
        assert options["sd_model_checkpoint"] != model
        options["sd_model_checkpoint"] = model
        assert http.post("/sdapi/v1/options", json=options, headers=headers).status_code == 200
        data = {"prompt": "a red circle", "batch_size": 2, "width": 64, "height": 64, "steps": 4, "negative_prompt": ""}
        answer = http.post("/sdapi/v1/txt2img", json=data, headers=headers)
        result = json.loads(answer.content)
        assert len(result["images"]) == 2 and isinstance(result["info"], str)
        assert Image.open(io.BytesIO(base64.b64decode(result["images"][0]))).size == (64, 64)
        assert info(answer)["sd_model_name"] == model.split()[0]


def test_open_webui_with_the_engine_of_openai(http: httpx2.Client) -> None:
    headers = {"authorization": "Bearer", "content-type": "application/json"}
    data = {"model": "dall-e-2", "prompt": "a red circle", "n": 1, "size": "64x64", "response_format": "b64_json"}
    made = http.post("/v1/images/generations?api-version=1", json=data | {"num_inference_steps": 4}, headers=headers)
    assert made.status_code == 200
    for image in (result := made.json()["data"]):
        assert image.get("url", None) is None and picture(image["b64_json"]).size == (64, 64)
    file = ("0a1b.png", base64.b64decode(result[0]["b64_json"]), "image/png")
    form = {"model": "first", "prompt": "a blue star", "n": "1", "size": "64x64", "response_format": "b64_json"}
    for name in ("image", "image[]"):
        edited = http.post("/v1/images/edits", data=form, files={name: file}, headers={"authorization": "Bearer none"})
        assert edited.status_code == 200, edited.text
        assert picture(edited.json()["data"][0]["b64_json"]).size == (64, 64)


def test_silly_tavern(http: httpx2.Client) -> None:
    assert http.get("/sdapi/v1/options").status_code == 200
    for path in ("upscalers", "latent-upscale-modes", "samplers", "schedulers"):
        assert all(isinstance(each["name"], str) for each in http.get(f"/sdapi/v1/{path}").json())
    assert http.get("/sdapi/v1/sd-vae").json() == []
    titles = [each["title"] for each in http.get("/sdapi/v1/sd-models").json()]
    for title in reversed(titles):
        assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": title}).status_code == 200
        progress = http.get("/sdapi/v1/progress").json()
        assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
    answer = http.post("/sdapi/v1/txt2img", json=SILLY_TAVERN | SMALL)
    assert pictures(answer)[0].size == (64, 64)
    assert answer.json()["ignored"] == ["save_images", "url", "auth"] == info(answer)["ignored"]


def test_progress_is_that_of_the_oldest_or_of_a_task(served: Served, http: httpx2.Client) -> None:
    with held() as free, ThreadPoolExecutor(2) as pool:
        first = pool.submit(txt2img, http, batch_size=2, force_task_id="task-a")
        until(lambda: len(served.service.unfinished) == 1)
        second = pool.submit(txt2img, http, force_task_id="task-b", steps=5)
        until(lambda: len(served.service.unfinished) == 2)
        said = http.get("/sdapi/v1/progress?skip_current_image=true").json()
        assert said["state"]["job_count"] == 2 and said["progress"] == 0.01 and said["state"]["sampling_steps"] == 4
        assert said["current_image"] is None and "of 2 requests" in said["textinfo"]
        other = http.get("/sdapi/v1/progress", params={"id_task": "task-b"}).json()
        assert other["state"]["job_count"] == 1 and other["state"]["sampling_steps"] == 5
        free.set()
        assert len(pictures(first.result())) == 2 and len(pictures(second.result())) == 1
    assert http.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_a_preview_is_there_for_those_who_turn_it_on(served: Served, http: httpx2.Client) -> None:
    seen: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(txt2img, http, steps=30, override_settings={"live_previews_enable": True})
        while not drawing.done():
            if found := http.get("/sdapi/v1/progress").json()["current_image"]:
                seen.append(found)
    assert seen and picture(seen[0]).size == (64, 64) and pictures(drawing.result())


def test_an_interrupt_ends_the_oldest_and_leaves_what_is_done(served: Served, http: httpx2.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(txt2img, http, batch_size=12, steps=12)
        job = until(lambda: served.service.unfinished)[0]
        until(lambda: job.pictures)
        assert http.post("/sdapi/v1/interrupt").json() == {}
        answer = drawing.result()
    assert 1 <= len(pictures(answer)) < 12 and info(answer)["interrupted"] is True
    assert info(answer)["all_seeds"] == [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18][: len(pictures(answer))]
    until(lambda: not served.service.unfinished)


def test_an_interrupt_reaches_no_request_of_another_api_and_a_task_by_name(served: Served, http: httpx2.Client) -> None:
    with held() as free, ThreadPoolExecutor(3) as pool:
        other = pool.submit(generate, http)
        first = pool.submit(txt2img, http, force_task_id="task-a")
        second = pool.submit(txt2img, http, force_task_id="task-b")
        until(lambda: len(served.service.unfinished) == 3)
        assert http.post("/sdapi/v1/interrupt", json={"id_task": "task-b"}).json() == {}
        assert info(second.result())["interrupted"] is True and pictures(second.result()) == []
        assert http.post("/sdapi/v1/interrupt", json={"id_task": "task-c"}).json() == {}
        free.set()
        assert other.result().status_code == 200 and len(pictures(first.result())) == 1


def test_an_interrupt_reaches_a_request_that_is_still_being_read(served: Served, http: httpx2.Client) -> None:
    """Every program sends it over another connection, at any moment behind the request."""
    with calls_held(Service, "submit") as free, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(txt2img, http, force_task_id="task-a")
        assert free.reached.wait(60)
        assert http.get("/sdapi/v1/progress?id_task=task-a").json()["progress"] == 0
        assert http.post("/sdapi/v1/interrupt", json={"id_task": "task-a"}).json() == {}
        assert http.post("/sdapi/v1/interrupt").json() == {}
        assert not served.service.unfinished and not drawing.done()
        free.set()
        assert pictures(drawing.result()) == [] and info(drawing.result())["interrupted"] is True
    until(lambda: not served.service.unfinished)


def test_an_interrupt_for_a_user_who_left_ends_no_other_users_request(served: Served, http: httpx2.Client) -> None:
    """A chat server sends it over a connection of its own and closes the one of the user who left, in either order."""
    for late in (False, True):
        with held() as free, ThreadPoolExecutor(2) as pool:
            stays = pool.submit(txt2img, http)  # the older one: a plain interrupt would end it
            until(lambda: len(served.service.unfinished) == 1)
            leaves = httpx2.Client(base_url=served.url, verify=False)
            thread = threading.Thread(target=_leave, args=(leaves,))
            thread.start()
            until(lambda: len(served.service.unfinished) == 2)
            interrupt = pool.submit(http.post, "/sdapi/v1/interrupt") if late else None
            time.sleep(0.02 if late else 0)
            _cut(leaves)
            until(lambda: len(served.service.unfinished) == 1)
            answered = interrupt.result() if interrupt else http.post("/sdapi/v1/interrupt")
            assert answered.json() == {}
            thread.join()
            free.set()
            assert len(pictures(stays.result())) == 1


def _leave(client: httpx2.Client) -> None:
    with pytest.raises(httpx2.TransportError):
        txt2img(client)


def _cut(client: httpx2.Client) -> None:
    """Close the connection of a client that waits in another thread."""
    import socket

    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_errors_have_the_web_uis_shape(http: httpx2.Client) -> None:
    post = "/sdapi/v1/txt2img"
    assert "enable_hr is not supported" in refused(txt2img(http, enable_hr=True), 400)
    assert "'DPM++ SDE', which is not served here" in refused(txt2img(http, sampler_name="DPM++ SDE"), 400)
    assert "batch_size times n_iter is 99" in refused(txt2img(http, batch_size=33, n_iter=3), 400)
    assert "multiple of 8" in refused(txt2img(http, width=65), 400)
    assert refused(txt2img(http, steps="many"), 400).startswith("steps is 'many'")
    assert refused(txt2img(http, cfg_scale=-1), 400).startswith("cfg_scale is -1")
    assert "no JSON" in refused(http.post(post, content=b"{"), 400)
    assert "no object" in refused(http.post(post, content=b"[]"), 400)
    wrong = {"override_settings": {"sd_model_checkpoint": "third"}}
    assert "choose first [" in refused(txt2img(http, **wrong), 400)
    assert "choose first [" in refused(http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "third"}), 400)
    assert "samples_format" in refused(http.post("/sdapi/v1/options", json={"samples_format": "bmp"}), 400)
    assert "not served" in refused(http.post("/sdapi/v1/extra-single-image", json={}), 404)
    assert "not served" in refused(http.put(post, json={}), 404)


def test_settings_and_requests_are_those_of_a_key() -> None:
    with Served(http=HttpSettings(keys=(KEY, "sk-of-two"), max_body=100_000)) as served:
        with served.http() as nobody:
            assert "key" in refused(txt2img(nobody), 401)
            assert refused(nobody.get("/sdapi/v1/options"), 401)
        one, two = served.http(auth=("anybody", KEY)), served.http(headers={"authorization": "Bearer sk-of-two"})
        with one, two:
            assert one.post("/sdapi/v1/options", json={"samples_format": "jpg"}).status_code == 200
            assert pictures(txt2img(one))[0].format == "JPEG" and pictures(txt2img(two))[0].format == "PNG"
            assert "larger" in refused(txt2img(one, prompt="a" * 200_000), 413)
            with held() as free, ThreadPoolExecutor(1) as pool:
                drawing = pool.submit(txt2img, one)
                until(lambda: served.service.unfinished)
                assert two.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
                two.post("/sdapi/v1/interrupt")
                free.set()
                assert len(pictures(drawing.result())) == 1
        with served.http(headers={"authorization": "Basic " + base64.b64encode(KEY.encode()).decode()}) as bare:
            assert bare.get("/sdapi/v1/options").status_code == 200
        with served.http(headers={"authorization": "Basic !!!"}) as broken:
            assert refused(broken.get("/sdapi/v1/options"), 401)


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    with held() as free:
        client = httpx2.Client(base_url=served.url, verify=False)
        thread = threading.Thread(target=_leave, args=(client,))
        thread.start()
        until(lambda: served.service.unfinished)
        _cut(client)
        until(lambda: not served.service.unfinished)
        thread.join()
        free.set()


def test_the_wait_for_a_dropped_connection_is_short() -> None:
    assert routes.DROPPED_WAIT <= 0.5
