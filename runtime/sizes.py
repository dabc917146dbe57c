"""Picture sizes: from text, and checked against a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..engines.bundle import LatentInfo
from ..engines.errors import RequestError


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height in pixels of a text such as `768x512`; raises `RequestError` for any other form."""
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if not match:
        raise RequestError(f"size is {text!r}: give WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


MAX_PIXELS = 1 << 24
"""Pixels of one picture: 4096x4096."""


def check_size(width: int, height: int, latent: LatentInfo) -> None:
    """Raise `RequestError` for a picture size that the latent geometry or `MAX_PIXELS` does not allow."""
    if width * height > MAX_PIXELS:
        given, most = (f"{pixels / 1e6:.0f} Mpixels" for pixels in (width * height, MAX_PIXELS))
        raise RequestError(f"the picture is {width}x{height}, {given}: at most {most} are drawn; give a smaller size")
    multiple = latent.size_multiple
    for name, size in (("width", width), ("height", height)):
        if size <= 0 or size % multiple:
            below = size // multiple * multiple
            near = f"{below} or {below + multiple}" if below > 0 else f"{multiple}"
            raise RequestError(f"{name} is {size}: this bundle needs a multiple of {multiple}; try {near}")


def size_of(text: str, latent: LatentInfo) -> tuple[int, int]:
    """Return (width, height) from `WIDTHxHEIGHT`, of no text the bundle's own; raises as the other two do."""
    if not text:
        return latent.default_width, latent.default_height
    width, height = parse_size(text)
    check_size(width, height, latent)
    return width, height


def checked_sizes(given: Sequence[tuple[int, int]] | None, latent: LatentInfo) -> list[tuple[int, int]]:
    """Return sizes (width, height) in pixels, of none the bundle's own; raises `RequestError` for what is no size."""
    sizes = list(given or [(latent.default_width, latent.default_height)])
    for size in sizes:
        if not isinstance(size, list | tuple) or [type(side) for side in size] != [int, int]:
            raise RequestError(f"sizes has {size!r}: give (width, height) in pixels, such as (512, 512)")
        check_size(*size, latent)
    return sizes
