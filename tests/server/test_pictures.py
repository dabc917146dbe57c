"""Pictures in and out as bytes: masks of either kind, EXIF, formats, base64."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from latentrt.runtime.service import Output
from latentrt.runtime.service.errors import RefusedError
from latentrt.runtime.service.pictures import bytes_of_text, check_shape, encoded, mask_of, picture_of
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


COLOURS = np.array([[[200, 40, 0], [0, 0, 0]], [[10, 20, 30], [0, 255, 7]]], np.uint8)
ALPHA = np.array([[255, 0], [102, 128]], np.uint8)


def test_what_is_transparent_is_laid_on_white() -> None:
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    share = ALPHA[..., None] / 255
    expected = share * COLOURS + (1 - share) * 255
    for options in ({}, {"format": "WEBP", "lossless": True, "exact": True}):
        found = np.asarray(picture_of(saved(image, **options), "image"), float)
        np.testing.assert_allclose(found, expected, atol=1)
    cut = picture_of(saved(palette()), "image")  # of which one colour is transparent
    assert (cut.getpixel((1, 0)), cut.getpixel((6, 0))) == ((255, 255, 255), (0, 0, 0))
    keyed = picture_of(saved(image.convert("RGB"), transparency=(0, 0, 0)), "image")
    assert (keyed.getpixel((1, 0)), keyed.getpixel((0, 0))) == ((255, 255, 255), (200, 40, 0))
    gray = Image.fromarray(np.full((2, 2), 30_000, np.uint16))  # of 16 bits, which has no alpha channel
    assert picture_of(saved(gray, transparency=0), "image").getpixel((0, 0)) == (117, 117, 117)


@pytest.mark.parametrize("size", [(640, 480), (320, 240), (9, 7)])
def test_a_mask_may_have_another_size(size: tuple[int, int]) -> None:
    check_shape(Image.new("RGB", size), Image.new("RGB", (640, 480)))
    check_shape(Image.new("1", (6000, 4000)), Image.new("RGB", (512, 341)))  # of a photograph that was made smaller


@pytest.mark.parametrize("size", [(480, 640), (640, 470), (64, 64)])
def test_a_mask_has_the_shape_of_its_picture(size: tuple[int, int]) -> None:
    with pytest.raises(
        RefusedError, match=r"^mask is [0-9x]+ and image 640x480: give a mask of the picture"
    ) as refused:
        check_shape(Image.new("RGB", size), Image.new("RGB", (640, 480)))
    assert refused.value.param == "mask"


def test_text_is_bytes_in_base64_or_a_data_url() -> None:
    data = b"\x89PNG bytes"
    text = base64.b64encode(data).decode()
    assert bytes_of_text(text, "image") == bytes_of_text(f"data:image/png;base64,{text}", "image") == data
    lines = base64.encodebytes(bytes(range(256))).decode()
    assert bytes_of_text(lines, "image") == bytes_of_text(f"data:;base64,{lines}", "image") == bytes(range(256))
    assert bytes_of_text(lines.replace("\n", "\r\n"), "image") == bytes(range(256))
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
