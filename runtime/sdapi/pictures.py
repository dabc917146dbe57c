"""What a picture is drawn from, as the web UI means it: stretched, cut or filled to a size, and masks of its kind."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..pictures.initial import LANCZOS, centred, filled
from ..pictures.load import load_image
from ..service.errors import RefusedError
from ..service.pictures import bytes_of_text, decoded, picture_of

BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""Radii and repetitions with which the colors around a mask are spread into it: those of the web UI."""
MOST_SPREAD = 1 << 22
"""Pixels at which that is done, at most: a larger picture takes its colors from a smaller copy."""

STRETCH, CUT, FILL = range(3)


def initial_picture(text: str) -> Image.Image:
    """Return the RGB picture of a base64 text or a `data:` URL; raises `RefusedError`."""
    return picture_of(bytes_of_text(text, "init_images"), "init_images")


def initial_mask(text: str, *, invert: bool) -> Image.Image:
    """Return a gray mask in which white is repainted; raises `RefusedError`.

    A mask with transparency is painted where it is opaque, one without where it is white.
    """

    def painted(image: Image.Image) -> Image.Image:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if np.asarray(alpha).min() < 255:
                return alpha
        return load_image(image, "mask")

    mask = decoded(bytes_of_text(text, "mask"), "mask", painted)
    mask = mask.convert("L")
    return ImageOps.invert(mask) if invert else mask


def sized(picture: Image.Image, width: int, height: int, mode: int) -> Image.Image:
    """Return a picture at a size, by one of the web UI's modes; raises `RefusedError` for the fourth."""
    if mode == STRETCH or picture.size == (width, height):
        return picture.resize((width, height), LANCZOS)
    if mode not in (CUT, FILL):
        raise RefusedError(f"resize_mode is {mode}: give 0 to stretch, 1 to cut or 2 to fill", "resize_mode")
    return (centred if mode == CUT else filled)(picture, width, height)


def spread(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture whose masked part has the colors of what is around it, as the web UI's masked content "fill".

    The mask is black and white, and of the picture's size.
    """
    factor = math.ceil(math.sqrt(picture.width * picture.height / MOST_SPREAD))
    if factor > 1:
        covered = mask.reduce(factor).point(lambda value: 255 * (value > 0))
        return Image.composite(spread(picture.reduce(factor), covered).resize(picture.size), picture, mask)
    around = Image.new("RGBa", picture.size)
    around.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    whole = Image.new("RGBA", picture.size)
    for radius, times in BLURS:
        blurred = around.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            whole.alpha_composite(blurred)
    return whole.convert("RGB")
