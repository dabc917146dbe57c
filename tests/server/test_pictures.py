"""Pictures in and out as bytes: masks of either kind, EXIF, formats, base64."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from latentrt.runtime.service import Output
from latentrt.runtime.service.errors import RefusedError
from latentrt.runtime.service.pictures import bytes_of_text, encoded, mask_of, picture_of
from PIL import Image


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


LEFT = np.zeros((4, 8), np.uint8)
LEFT[:, :4] = 255
"""White on the left."""


def rgba(gray: int, alpha: np.ndarray[Any, Any]) -> Image.Image:
    return Image.merge("RGBA", (*[Image.new("L", (8, 4), gray)] * 3, Image.fromarray(alpha)))


def palette() -> Image.Image:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 200, 200, 200])
    image.paste(1, (0, 0, 4, 4))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (Image.fromarray(LEFT), "white on the left"),
        (Image.fromarray(LEFT).convert("RGB"), "in colours"),
        (Image.fromarray(LEFT).convert("1"), "of bits"),
        (Image.fromarray(LEFT.astype(np.int32) * 257).convert("I;16"), "of 16 bits"),
        (rgba(0, 255 - LEFT), "OpenAI's, black"),
        (rgba(255, 255 - LEFT), "OpenAI's, white"),
        (palette(), "OpenAI's, of a palette"),
        (Image.merge("RGBA", (*[Image.fromarray(LEFT)] * 3, Image.new("L", (8, 4), 255))), "opaque everywhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_white_is_repainted_in_every_kind_of_mask(mask: Image.Image, what: str) -> None:
    found = np.asarray(mask_of(saved(mask), "mask").convert("L"))
    np.testing.assert_array_equal(found, LEFT)


def test_a_picture_is_turned_upright() -> None:
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for read in (picture_of, mask_of):
        assert read(saved(image, exif=exif), "image").size == (4, 8)


def test_text_is_bytes_in_base64_or_a_data_url() -> None:
    data = b"\x89PNG bytes"
    text = base64.b64encode(data).decode()
    assert bytes_of_text(text, "image") == bytes_of_text(f"data:image/png;base64,{text}", "image") == data
    for wrong in ("data:image/png,abc", "https://x/y.png", "file:///etc/passwd", "abc", "ü"):
        with pytest.raises(RefusedError) as refused:
            bytes_of_text(wrong, "image")
        assert refused.value.param == "image"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_codecs_that_nobody_needs_are_not_run(format: str) -> None:
    with pytest.raises(RefusedError, match="PNG, JPEG or WebP"):
        picture_of(saved(Image.new("RGB", (16, 16)), format), "image")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damage_is_refused_wherever_it_is(format: str) -> None:
    whole = saved(Image.effect_noise((32, 32), 90).convert("RGB"), format)
    for length in range(0, len(whole) - 1, max(1, len(whole) // 20)):
        try:
            picture_of(whole[:length], "image")
        except RefusedError as refused:
            assert refused.param == "image" and "\n" not in str(refused)


def test_pictures_out() -> None:
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    exact = Image.open(io.BytesIO(encoded(image, Output("png"))))
    np.testing.assert_array_equal(np.asarray(exact), np.asarray(image))
    for format in ("jpeg", "webp"):
        sizes = [len(encoded(image, Output(format, quality))) for quality in (0, 50, 100)]  # type: ignore[arg-type]
        assert sizes == sorted(sizes)
