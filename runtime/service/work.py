"""A request to a service, and what a request may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ...engines.bundle import Manifest
from ...engines.errors import RequestError
from ..sizes import check_size
from .errors import RefusedError

Format = Literal["png", "jpeg", "webp"]
Task = Literal["generation", "edit"]
Size = tuple[int, int]
"""Width and height in pixels."""

MOST_SECONDS = 1_000_000_000
"""Of every setting: the system's timers take no more."""

TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")


@dataclass(frozen=True)
class Output:
    """How pictures are encoded; `quality` 0 to 100 is for jpeg and webp."""

    format: Format = "png"
    quality: int = 95

    @property
    def media_type(self) -> str:
        """The content type of the bytes."""
        return f"image/{self.format}"


@dataclass(frozen=True)
class Work:
    """A request with checked fields: what a batcher's `submit` takes, and what is around it."""

    arguments: Mapping[str, Any] = field(repr=False)
    """Keyword arguments of `Batcher.submit`; pictures are PIL's. Without `width` and `height` the service chooses."""
    model: str | None = None
    """The name of a bundle; None: the first one."""
    task: Task = "generation"
    output: Output = Output()
    previews: int = 0
    """Pictures of each image on its way."""
    timeout: float | None = None
    """Seconds after which nobody wants the result; None: the service's own."""
    owner: str = ""
    """Whose it is: jobs of others are not seen."""
    request_id: str = ""

    @property
    def images(self) -> int:
        """How many pictures are asked for."""
        return int(self.arguments.get("num_images_per_prompt") or 1)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much of one key may be unfinished."""

    images: int = 10
    steps: int = 150
    prompt: int = 10_000
    """Characters of each text."""
    work: float = 2000.0
    """Megapixels times images times steps."""
    previews: int = 3
    timeout: float = 600.0
    """Seconds that a request may take, and what one gets that names none."""
    unfinished: int | None = None
    """Unfinished requests of one key; None: any number."""

    def __post_init__(self) -> None:
        """Raise `RequestError` for limits that allow nothing."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not (0 < value < math.inf or (each.name == "previews" and value == 0)):
                raise RequestError(f"the limit {each.name} is {value!r}: give a number above 0")
        check_timer("the limit timeout", self.timeout)

    def check(self, work: Work, manifest: Manifest, size: Size) -> None:
        """Raise `RefusedError` for a request over a limit; `size` is that of its pictures."""
        arguments = work.arguments
        for name in TEXTS:
            if isinstance(text := arguments.get(name), str) and len(text) > self.prompt:
                raise RefusedError(f"{name} has {len(text)} characters: at most {self.prompt} are read", name)
        if work.images > self.images:
            raise RefusedError(f"n is {work.images}: at most {self.images} pictures of a request are drawn", "n")
        if work.previews > self.previews:
            raise RefusedError(f"partial_images is {work.previews}: at most {self.previews}", "partial_images")
        if work.timeout is not None and work.timeout > self.timeout:
            raise RefusedError(f"timeout is {work.timeout:g}: at most {self.timeout:g} seconds", "timeout")
        custom = next((name for name in ("timesteps", "sigmas") if arguments.get(name)), None)
        steps = arguments.get("num_inference_steps") or manifest.default_num_inference_steps
        steps = len(arguments[custom]) if custom else steps
        if steps > self.steps:
            raise RefusedError(f"{steps} steps: at most {self.steps} are run", custom or "num_inference_steps")
        wanted = size[0] * size[1] / 1e6 * work.images * steps
        if wanted > self.work:
            raise RefusedError(
                f"{work.images} pictures of {size[0]}x{size[1]} in {steps} steps are {wanted:.4g} megapixel steps: "
                f"at most {self.work:g} of a request; ask for less",
                "n",
            )


def check_timer(name: str, value: float, *, zero: bool = False) -> None:
    """Raise `RequestError` for a setting that is no time a server can wait; `zero`: 0 is one as well."""
    if not (0 < value <= MOST_SECONDS or (zero and value == 0)):
        least = "0 or more" if zero else "more than 0"
        raise RequestError(f"{name} is {value:g}: give seconds, {least} and at most {MOST_SECONDS}")


def size_of(work: Work, manifest: Manifest, allowed: tuple[Size, ...] | None, most_pixels: int) -> Size:
    """Return the size of a request's pictures: one of those `allowed`; with None, any of so many pixels at most.

    Without one it is the bundle's, and for an edit the picture's, or what is allowed that is nearest to it. Raises
    `RefusedError`.
    """
    latent, arguments = manifest.latent, work.arguments
    width, height = arguments.get("width"), arguments.get("height")
    if width is None or height is None:
        size = latent.default_width, latent.default_height
        image = arguments.get("image")
        if image is not None and arguments.get("padding_mask_crop") is None:
            multiple = latent.size_multiple
            shrunk = min(1.0, math.sqrt(most_pixels / (image.width * image.height)))
            across, down = (max(multiple, int(side * shrunk) // multiple * multiple) for side in image.size)
            if allowed is None and across * down > most_pixels:  # its short side has no fewer pixels
                raise RefusedError(
                    f"image is {image.width}x{image.height}, which is drawn at {across}x{down}: at most {most_pixels} "
                    "pixels are drawn; cut it, or give a size",
                    "image",
                    "unsupported_size",
                )
            size = across, down
        return size if allowed is None or size in allowed else _nearest(size, allowed)
    if allowed is not None and (width, height) not in allowed:
        names = ", ".join("{}x{}".format(*each) for each in allowed)
        raise RefusedError(f"size is {width}x{height}: this server draws {names}", "size", "unsupported_size")
    try:
        check_size(width, height, latent)
    except RequestError as error:
        raise RefusedError(str(error), "size", "unsupported_size") from error
    if allowed is None and width * height > most_pixels:
        side = math.isqrt(most_pixels)
        raise RefusedError(
            f"size is {width}x{height}: at most {most_pixels} pixels are drawn, such as {side}x{side}",
            "size",
            "unsupported_size",
        )
    return width, height


def _nearest(size: Size, allowed: tuple[Size, ...]) -> Size:
    """Return the allowed size of the most similar shape, and among those of the most similar area."""

    def distance(other: Size) -> tuple[float, float]:
        shape = (size[0] * other[1]) / (size[1] * other[0])
        area = (size[0] * size[1]) / (other[0] * other[1])
        return round(max(shape, 1 / shape), 3), max(area, 1 / area)

    return min(allowed, key=distance)


FORMATS = get_args(Format)
