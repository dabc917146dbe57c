"""Pictures as bytes: what comes out is encoded, what comes in is read from bytes alone."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...engines.errors import RequestError
from ..pictures.load import FORMATS, MAX_PIXELS, load_image
from ..pictures.png import encode_png
from .errors import RefusedError
from .work import Output

READ = ("PNG", "JPEG", "WEBP")
"""The formats that are decoded: a server is no place for every codec that Pillow has."""
WHITESPACE = b" \t\n\v\f\r"
"""Encoders break lines of base64, and decoders skip that."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture and what made it."""

    data: bytes = field(repr=False)
    output: Output
    seed: int | None = None
    encode_seconds: float = 0.0

    @property
    def text(self) -> str:
        """The bytes in base64, which are not kept beside them."""
        return base64.b64encode(self.data).decode("ascii")


def encoded(picture: Image.Image, output: Output, request: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes of a picture; `request` is written into a PNG."""
    if output.format == "png":
        return encode_png(picture, request)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": output.quality}
    if output.format == "webp":
        options["method"] = 2  # a third of the time of the default, and 3 % larger
    picture.save(buffer, output.format.upper(), **options)
    return buffer.getvalue()


def picture_of(data: bytes, name: str) -> Image.Image:
    """Return the RGB picture in some bytes, turned upright; raises `RefusedError` naming the field.

    What is transparent is laid on white, as the page and the web UI do: the colours below it are often black.
    """

    def on_white(image: Image.Image) -> Image.Image:
        if image.has_transparency_data and not image.mode.startswith(("I", "F")):  # those have no alpha channel
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return load_image(image, name)

    return decoded(data, name, on_white)


def mask_of(data: bytes, name: str) -> Image.Image:
    """Return a mask in which white is repainted, from either kind.

    With an alpha channel that is not opaque everywhere it is OpenAI's: what is transparent is repainted. Without one,
    white is.
    """

    def white_is_repainted(image: Image.Image) -> Image.Image:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if np.asarray(alpha).min() < 255:
                return ImageOps.invert(alpha).convert("RGB")
        return load_image(image, name)

    return decoded(data, name, white_is_repainted)


def check_shape(mask: Image.Image, image: Image.Image) -> None:
    """Raise `RefusedError` for a mask that would have to be stretched over its picture; smaller or larger it may be."""
    apart = abs(mask.height * image.width - mask.width * image.height)
    if apart > max(*mask.size, *image.size):  # more than rounding one of the two to a pixel
        sizes = "mask is {}x{} and image {}x{}".format(*mask.size, *image.size)
        raise RefusedError(f"{sizes}: give a mask of the picture's size, or of its shape", "mask")


def bytes_of_text(text: str, name: str) -> bytes:
    """Return the bytes of a `data:` URL or of base64, in lines or in one; raises `RefusedError`, for other URLs too."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RefusedError(f"{name} is a data: URL without ;base64: give base64", name)
    elif "://" in text[:20]:
        raise RefusedError(f"{name} is a URL: nothing is fetched, give the picture as base64 or as a data: URL", name)
    try:
        return base64.b64decode(text.encode("ascii").translate(None, WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"{name} is no base64: give the bytes of a PNG, JPEG or WebP file", name) from error


def decoded(data: bytes, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Open a picture in some bytes, turn it upright, and convert it; raises `RefusedError` naming the field."""
    if not data:
        raise RefusedError(f"{name} is empty: {FORMATS}", name)
    try:
        with Image.open(io.BytesIO(data), formats=READ) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise RefusedError(f"{name} is {size}: at most {MAX_PIXELS >> 20} Mpixels are read; shrink it", name)
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise RefusedError(f"{name} has {frames} frames: give a picture", name)
            return convert(ImageOps.exif_transpose(image))
    except (RefusedError, MemoryError):
        raise
    except RequestError as error:
        raise RefusedError(str(error), name) from error
    except Exception as error:  # decoders of damaged files raise many kinds
        raise RefusedError(f"{name} cannot be read as a picture: {FORMATS}", name) from error
