"""Fields of the web UI's API: what clients send by default is served, what would be another picture is refused."""

from __future__ import annotations

import base64
import inspect
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from latentrt.runtime.sdapi import pictures
from latentrt.runtime.sdapi.fields import ImageToImage, TextToImage, ignored
from latentrt.runtime.sdapi.work import renamed
from latentrt.runtime.service.errors import RefusedError

SILLY_TAVERN = {
    "prompt": "a cat",
    "negative_prompt": "",
    "sampler_name": "Euler a",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
    "url": "http://localhost:7860",
    "auth": "",
}
"""What SillyTavern's server sends, its own two fields among it."""

DOCUMENTED = {
    "prompt": "",
    "negative_prompt": "",
    "styles": [],
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": "Euler",
    "scheduler": "",
    "batch_size": 1,
    "n_iter": 1,
    "steps": 50,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": None,
    "tiling": None,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "eta": 0,
    "denoising_strength": 0,
    "s_min_uncond": 0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 0,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "refiner_switch_at": 0,
    "disable_extra_networks": False,
    "comments": {},
    "enable_hr": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "force_task_id": None,
    "sampler_index": "Euler",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "infotext": None,
}
"""The web UI's own example of a request."""


def test_what_clients_send_by_default_is_served() -> None:
    assert ignored(TextToImage(**DOCUMENTED)) == ["s_noise"]  # which clients that do not copy it leave out, or set to 1
    assert ignored(TextToImage(**SILLY_TAVERN)) == ["save_images", "url", "auth"]


def test_what_the_python_client_sends_by_default_is_served() -> None:
    webuiapi = pytest.importorskip("webuiapi")
    for method, schema in (("txt2img", TextToImage), ("img2img", ImageToImage)):
        signature = inspect.signature(getattr(webuiapi.WebUIApi, method))
        defaults = {name: each.default for name, each in signature.parameters.items() if name not in ("self", "images")}
        mine = ("controlnet_units", "adetailer", "animatediff", "roop", "reactor", "sag", "use_async", "mask_image")
        sent = {name: value for name, value in defaults.items() if name not in (*mine, "use_deprecated_controlnet")}
        assert ignored(schema(**sent)) == []


def test_null_is_as_absent() -> None:
    empty = TextToImage()
    assert TextToImage(**dict.fromkeys(TextToImage.model_fields)) == empty
    assert ImageToImage(**dict.fromkeys(ImageToImage.model_fields)) == ImageToImage()


@pytest.mark.parametrize(
    "given",
    [
        {"enable_hr": True},
        {"tiling": True},
        {"script_name": "x/y/z plot"},
        {"alwayson_scripts": {"ControlNet": {"args": [{"image": "…"}]}}},
        {"alwayson_scripts": {"ControlNet": ["a"]}},
        {"subseed_strength": 0.5},
        {"seed_resize_from_w": 512},
        {"s_churn": 4},
        {"refiner_checkpoint": "sdxl-refiner"},
        {"infotext": "a cat\nSteps: 20"},
        {"clip_skip": 2},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_would_be_another_picture_is_refused_in_one_line(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(RefusedError, match=f"^{name} is not supported: ") as raised:
        ignored(TextToImage(**given))
    assert "\n" not in str(raised.value) and raised.value.param == name


def test_what_leaves_the_picture_as_it_is_is_named() -> None:
    body = TextToImage(
        styles=["film"], restore_faces=True, wheels=4, nothing=None, alwayson_scripts={"a": {"args": []}}, s_noise=1.05
    )
    assert ignored(body) == ["styles", "restore_faces", "s_noise", "wheels"]
    assert ignored(TextToImage(s_noise=1)) == ignored(TextToImage(s_noise=None)) == []


@pytest.mark.parametrize("none", [None, "", "None", "none"])
def test_none_is_a_choice_that_asks_for_nothing(none: str | None) -> None:
    assert ignored(TextToImage(refiner_checkpoint=none, styles=[none])) == []


def test_messages_name_the_fields_of_this_api() -> None:
    assert renamed("n is 20: at most 10") == "batch_size times n_iter is 20: at most 10"
    assert renamed("strength is 2: give less") == "denoising_strength is 2: give less"
    assert renamed("strengthen the rest") == "strengthen the rest"


def text_of(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_mask_is_painted_where_it_is_white_or_opaque() -> None:
    gray = Image.new("L", (8, 4))
    gray.paste(255, (0, 0, 4, 4))
    clear = Image.new("RGBA", (8, 4))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 4))
    for mask in (gray, gray.convert("RGB"), gray.convert("RGBA"), clear):
        for prefix in ("", "data:image/png;base64,"):
            seen = np.asarray(pictures.initial_mask(prefix + text_of(mask), invert=False))
            assert (seen[:, :4] == 255).all() and (seen[:, 4:] == 0).all()
    seen = np.asarray(pictures.initial_mask(text_of(gray), invert=True))
    assert (seen[:, :4] == 0).all() and (seen[:, 4:] == 255).all()


def test_masked_content_takes_the_colors_around_it_and_leaves_the_rest() -> None:
    picture = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    picture[20:40, 20:40] = (0, 255, 0)
    mask = np.zeros((64, 64), np.uint8)
    mask[18:42, 18:42] = 255
    filled = np.asarray(pictures.spread(Image.fromarray(picture), Image.fromarray(mask))).astype(int)
    assert (filled[mask == 0] == picture[mask == 0]).all()
    assert np.abs(filled[mask > 0] - (200, 40, 90)).max() <= 6  # alpha is rounded to 8 bits at every blend


def test_sizes_are_met_as_the_web_ui_meets_them() -> None:
    """A wide picture with a red left and a blue right end: cut, both are gone; filled, both are there."""
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste((255, 0, 0), (0, 0, 60, 100))
    wide.paste((0, 0, 255), (240, 0, 300, 100))
    cut = np.asarray(pictures.sized(wide, 96, 96, pictures.CUT))
    assert cut.shape == (96, 96, 3) and (cut > 250).all()
    filled = np.asarray(pictures.sized(wide, 96, 96, pictures.FILL))
    assert filled.shape == (96, 96, 3)
    assert (filled[48, 5] == (255, 0, 0)).all() and (filled[48, -5] == (0, 0, 255)).all()
    stretched = np.asarray(pictures.sized(wide, 96, 96, pictures.STRETCH))
    assert (stretched[:, 8] == (255, 0, 0)).all() and (stretched[:, 48] == 255).all()
    with pytest.raises(RefusedError, match="resize_mode is 3"):
        pictures.sized(wide, 96, 96, 3)


@pytest.mark.parametrize("text", ["http://example.com/a.png", "data:image/png,abc", "!!!", "", "AAAA"])
def test_what_is_no_picture_is_refused_by_the_name_of_its_field(text: str) -> None:
    with pytest.raises(RefusedError, match=r"^init_images is|^init_images cannot") as raised:
        pictures.initial_picture(text)
    assert raised.value.param == "init_images"
