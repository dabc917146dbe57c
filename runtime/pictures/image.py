"""Pictures in and out: resizing and masks as diffusers does them, PNG with the request inside, labelled grids."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from ...engines.errors import RequestError

Pixels = npt.NDArray[np.uint8]

TEXT_KEY = "latentrt"
"""The PNG text chunk that holds the request as JSON."""

# zlib's fastest level with run-length matches only (Z_RLE).
COMPRESSION: dict[str, Any] = {"compress_level": 1, "compress_type": 3}


def load_image(source: Any, what: str = "image") -> Image.Image:
    """Return an RGB picture from a path, a PIL image, or a [H, W, 3] array (uint8, or floats in [0, 1])."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        array = np.squeeze(source)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3):
            raise RequestError(f"{what} has shape {list(source.shape)}: give one picture as [H, W, 3] or [H, W]")
        if array.dtype != np.uint8:
            if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
                raise RequestError(f"{what} is a {array.dtype} array outside [0, 1]: scale it, or give uint8")
            array = (array * 255).round().astype(np.uint8)
        return Image.fromarray(array).convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise RequestError(f"{what} {source} does not exist: give the path of a PNG, JPEG or WebP file") from error
    except (UnidentifiedImageError, OSError, AttributeError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{what} {source} cannot be read as a picture: give a PNG, JPEG or WebP file") from error


def image_pixels(image: Image.Image, height: int, width: int) -> Pixels:
    """Return a picture as uint8 [height, width, 3], resized with Lanczos when it has another size."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def latent_mask(image: Image.Image, height: int, width: int, downscale: int) -> npt.NDArray[np.bool_]:
    """Return a mask as bool [1, height/downscale, width/downscale]: true where it is at least half white."""
    gray = image.convert("L")
    if gray.size != (width, height):
        gray = gray.resize((width, height), Image.Resampling.LANCZOS)
    binary = np.asarray(gray, np.float32) / 255 >= 0.5
    return binary[None, ::downscale, ::downscale]  # nearest neighbour, as the field does it


def encode_png(picture: Image.Image, request: Mapping[str, Any] | None = None) -> bytes:
    """Return a picture as PNG bytes, the request as JSON in its text chunk.

    Most of it runs without Python's lock: encode in a thread while the next request runs.
    """
    info = PngImagePlugin.PngInfo()
    if request is not None:
        info.add_itxt(TEXT_KEY, json.dumps(request, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, **COMPRESSION)
    return buffer.getvalue()


def request_from_png(path: Path) -> dict[str, Any]:
    """Return the request that a PNG written by latentrt carries, or raise `RequestError`."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(TEXT_KEY)
    except (OSError, UnidentifiedImageError) as error:
        raise RequestError(f"{path} cannot be read as a picture") from error
    if text is None:
        raise RequestError(f"{path} carries no latentrt request")
    request: dict[str, Any] = json.loads(text)
    return request


def grid(images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None) -> Image.Image:
    """Return pictures of one size side by side, each with its label below it."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    font = ImageFont.load_default(max(10, width // 14))
    lines = [_wrap(label, font, width - 8) for label in labels] if labels else [[] for _ in images]
    line_height = int(font.getbbox("Ag")[3] * 1.25)
    text_height = max(map(len, lines)) * line_height + (8 if labels else 0)
    gap = max(2, width // 32)
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, lines, strict=True)):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + text_height + gap)
        sheet.paste(image, (x, y))
        for number, line in enumerate(label):
            draw.text((x + 4, y + height + 4 + number * line_height), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
