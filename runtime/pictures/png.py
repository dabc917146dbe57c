"""Pictures out: PNG with the request inside, labelled grids."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

TEXT_KEY = "latentrt"
"""The PNG text chunk that holds the request as JSON."""

# zlib's fastest level with run-length matches only (Z_RLE).
COMPRESSION: dict[str, Any] = {"compress_level": 1, "compress_type": 3}


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
