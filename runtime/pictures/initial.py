"""What a request starts from: one picture or one for each image, masks, and the part of a picture around its mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...engines.errors import RequestError
from ..sizes import MAX_PIXELS
from .load import load_image

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Pictures:
    """The initial pictures and the masks of a request: one for all of its images, or one for each."""

    images: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...] = ()
    padding: int | None = None
    """Pixels around the mask that are drawn with it, alone and at the request's size; None: the whole picture."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the first picture."""
        return self.images[0].size

    def check(self, images: int) -> None:
        """Raise `RequestError` for more or fewer pictures than images."""
        for name, given in (("image", self.images), ("mask_image", self.masks)):
            if len(given) not in (0, 1, images):
                raise RequestError(f"{name} is {len(given)} pictures: give one, or one for each of the {images} images")

    def cut(self, width: int, height: int) -> Pictures:
        """Return what is drawn at a size: the pictures, or with `padding` the part around the mask, filled up to it."""
        if self.padding is None:
            return self
        box = crop_box(self.masks[0], width, height, self.padding)
        image, mask = (filled(each.crop(box), width, height) for each in (self.images[0], self.masks[0]))
        return replace(self, images=(image,), masks=(mask,))

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """Return the initial picture with what was drawn of its part around the mask; see `cut`."""
        if self.padding is None:
            return drawn
        image, mask = self.images[0], self.masks[0]
        left, top, right, bottom = crop_box(mask, *drawn.size, self.padding)
        kept = Image.new("RGBa", image.size)
        kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        whole = Image.new("RGB", image.size)
        whole.paste(centred(drawn, right - left, bottom - top), (left, top))
        whole = whole.convert("RGBA")
        whole.alpha_composite(kept.convert("RGBA"))
        return whole.convert("RGB")


def load_pictures(image: Any, mask: Any, strength: float | None, padding: int | None = None) -> Pictures | None:
    """Load initial pictures and masks, one or a list of each; None where there are none.

    Raises `RequestError` for what makes no sense without a picture or a mask.
    """
    if image is None:
        for name, value in (("mask_image", mask), ("strength", strength), ("padding_mask_crop", padding)):
            if value is not None:
                raise RequestError(f"{name} was given without image: give the picture to start from as well")
        return None
    pictures = Pictures(_each(image, "image"), () if mask is None else _each(mask, "mask_image"), padding)
    if padding is not None:
        _check_padding(pictures)
    return pictures


def _each(source: Any, what: str) -> tuple[Image.Image, ...]:
    """Load one picture, a list of them, or several in an array [n, H, W, 3] or a tensor [n, 3, H, W]."""
    if isinstance(source, np.ndarray) and source.ndim == 4 and len(source) > 1 and source.shape[-1] in (1, 3):
        source = list(source)
    if hasattr(source, "detach") and source.ndim == 4 and len(source) > 1:
        source = list(source)
    if not isinstance(source, list | tuple):
        return (load_image(source, what),)
    if not source:
        raise RequestError(f"{what} is an empty list: give one picture, or one for each image")
    return tuple(load_image(each, what) for each in source)


def _check_padding(pictures: Pictures) -> None:
    padding = pictures.padding
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise RequestError(f"padding_mask_crop is {padding!r}: give pixels around the mask, 0 or more")
    if len(pictures.images) != 1 or len(pictures.masks) != 1:
        raise RequestError("padding_mask_crop is for one picture with one mask_image: give both, and no list")
    if pictures.images[0].size != pictures.masks[0].size:
        sizes = ["{}x{}".format(*each.size) for each in (pictures.masks[0], pictures.images[0])]
        raise RequestError(f"mask_image is {sizes[0]} and image {sizes[1]}: padding_mask_crop needs one size")
    if pictures.masks[0].convert("L").getbbox() is None:
        raise RequestError("mask_image is all black, so padding_mask_crop finds no part to draw: paint its area white")


def crop_box(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    """Return the box around all of a mask that is not black, `padding` larger, in the proportions of width x height.

    As diffusers' `get_crop_region`; where the picture is too small for the proportions they are not met.
    """
    left, top, right, bottom = mask.convert("L").getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    wanted = width / height
    if (right - left) / (bottom - top) > wanted:
        top, bottom = _grown(top, bottom, (right - left) / wanted, mask.height)
    else:
        left, right = _grown(left, right, (bottom - top) * wanted, mask.width)
    return left, top, right, bottom


def _grown(begin: int, end: int, length: float, limit: int) -> tuple[int, int]:
    """Return an interval grown on both sides to a length, moved and then cut to lie in [0, limit]."""
    more = int(length - (end - begin))
    begin, end = begin - more // 2, end + more - more // 2
    if end >= limit:
        begin, end = begin - (end - limit), limit
    if begin < 0:
        begin, end = 0, end - begin
    return begin, min(end, limit)


def filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture fitted inside a size, its edges drawn out to fill the rest (diffusers' resize_mode "fill")."""
    across = width / height < image.width / image.height
    inner_width = width if across else max(1, image.width * height // image.height)
    inner_height = max(1, image.height * width // image.width) if across else height
    inner = image.resize((inner_width, inner_height), LANCZOS)
    result = Image.new("RGB", (width, height))
    left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
    result.paste(inner, (left, top))
    if across and top > 0:
        result.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        edge = inner.resize((width, top), box=(0, inner_height, width, inner_height))
        result.paste(edge, (0, top + inner_height))
    elif left > 0:
        result.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        edge = inner.resize((left, height), box=(inner_width, 0, inner_width, height))
        result.paste(edge, (left + inner_width, 0))
    return result


def centred(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture scaled to cover a size, what is over cut off evenly (diffusers' resize_mode "crop")."""
    across = width / height > image.width / image.height
    inner_width = width if across else image.width * height // image.height
    inner_height = image.height * width // image.width if across else height
    left, top = inner_width // 2 - width // 2, inner_height // 2 - height // 2
    if inner_width * inner_height <= MAX_PIXELS:
        result = Image.new("RGB", (width, height))
        result.paste(image.resize((inner_width, inner_height), LANCZOS), (-left, -top))
        return result
    box = (  # what stays: all of a narrow picture, scaled, would fill the memory
        *(left * image.width / inner_width, top * image.height / inner_height),
        *((left + width) * image.width / inner_width, (top + height) * image.height / inner_height),
    )
    return image.resize((width, height), LANCZOS, box).convert("RGB")
