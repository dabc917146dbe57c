"""Pictures of the web UI's API that would be large: refused before they are, and slivers that become none."""

from __future__ import annotations

import base64
from typing import Any

import httpx2
import numpy as np
import pytest
from latentrt.runtime.pictures import initial
from latentrt.runtime.pictures.initial import centred, filled
from latentrt.runtime.sdapi import pictures, work
from PIL import Image

from .conftest import picture, png

ASKED: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 3, "denoising_strength": 0.5}


def text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


DOT = text(Image.new("RGB", (8, 8), "red"))
SLIVERS = [(1, 65_536), (65_536, 1)]


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of the pictures that were resized or made from now on."""
    seen, resize, new = [0], Image.Image.resize, Image.new

    def resized(image: Image.Image, size: tuple[int, int], *given: Any, **named: Any) -> Image.Image:
        seen.append(size[0] * size[1])
        assert seen[-1] < 1 << 28, "which takes memory"
        return resize(image, size, *given, **named)

    def made(mode: str, size: tuple[int, int], *given: Any, **named: Any) -> Image.Image:
        seen.append(size[0] * size[1])
        assert seen[-1] < 1 << 28, "which takes memory"
        return new(mode, size, *given, **named)

    monkeypatch.setattr(Image.Image, "resize", resized)
    monkeypatch.setattr(Image, "new", made)
    return seen


@pytest.mark.parametrize("fields", [{}, {"mask": DOT, "inpaint_full_res": False}, {"mask": DOT}])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_size_that_is_not_drawn_is_refused_before_a_picture_has_it(
    http: httpx2.Client, largest: list[int], fields: dict[str, Any], mode: int
) -> None:
    size = {"width": 65_536, "height": 65_536, "resize_mode": mode}
    answer = http.post("/sdapi/v1/img2img", json={**ASKED, "init_images": [DOT], **size, **fields})
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_size"), answer.text
    assert max(largest) < 1 << 20


def test_a_size_that_a_masked_picture_has_is_checked_before_it_is_worked_on(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(work, "spread", lambda *given: called.append(given))
    large = text(Image.new("RGB", (1024, 1024)))
    fields = {"init_images": [large], "mask": DOT, "inpaint_full_res": False}
    answer = http.post("/sdapi/v1/img2img", json={**ASKED, **fields})
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported_size") and not called


@pytest.mark.parametrize("size", SLIVERS)
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_sliver_is_fitted_as_any_picture(
    http: httpx2.Client, largest: list[int], size: tuple[int, int], mode: int
) -> None:
    fields = {"init_images": [text(Image.new("RGB", size, "red"))], "width": 64, "height": 64, "resize_mode": mode}
    answer = http.post("/sdapi/v1/img2img", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    assert picture(answer.json()["images"][0]).size == (64, 64) and max(largest) < 1 << 22


@pytest.mark.parametrize("size", SLIVERS)
def test_a_part_that_is_a_sliver_is_drawn_and_put_back(largest: list[int], size: tuple[int, int]) -> None:
    for fit in (centred, filled):
        assert fit(Image.new("RGB", size, "red"), 64, 64).getpixel((32, 32)) == (255, 0, 0)
        assert fit(Image.new("RGB", (64, 64), "red"), *size).size == size
    assert max(largest) < 1 << 22


@pytest.mark.parametrize("size", [(300, 100), (64, 48), (33, 77), (96, 96), (41, 40)])
@pytest.mark.parametrize("to", [(96, 96), (40, 24), (17, 63), (128, 120)])
@pytest.mark.parametrize("most", [initial.MAX_PIXELS, 0])
def test_pictures_are_cut_and_filled_as_diffusers_does(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], to: tuple[int, int], most: int
) -> None:
    monkeypatch.setattr(initial, "MAX_PIXELS", most)
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    levels = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), np.uint8)  # none is clipped on the way
    noise = Image.fromarray(levels)
    for ours, theirs in ((centred, processor._resize_and_crop), (filled, processor._resize_and_fill)):
        found, expected = (np.asarray(fit(noise, *to), int) for fit in (ours, theirs))
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (61, 47)])
def test_masked_content_of_a_large_picture_is_that_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(pictures, "MOST_SPREAD", 500)
    whole = np.full((size[1], size[0], 3), (200, 40, 90), np.uint8)
    whole[20:31, 21:40] = (0, 255, 0)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[19:32, 20:41] = 255
    spread = np.asarray(pictures.spread(Image.fromarray(whole), Image.fromarray(mask))).astype(int)
    assert (spread[mask == 0] == whole[mask == 0]).all()
    assert np.abs(spread[mask > 0] - (200, 40, 90)).max() <= 6  # as of a small one
