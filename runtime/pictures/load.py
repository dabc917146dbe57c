"""Pictures in: every kind of file or array that has one meaning, as RGB; resizing and masks as diffusers does them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ...engines.device import Array
from ...engines.errors import RequestError, reason

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 1 << 26
"""Pixels that a picture may have before it is decoded: a small file may hold a picture that fills the memory."""

FORMATS = "give a PNG, JPEG or WebP file"


def load_image(source: Any, what: str = "image") -> Image.Image:
    """Return an RGB picture from a path, a PIL picture, or an array [H, W, 3] or [H, W].

    A file is turned upright as its EXIF orientation says. Gray levels of 16 bits are scaled to 8, floats must lie in
    [0, 1], transparency is left out. Raises `RequestError` for several pictures, for one of more than `MAX_PIXELS`, and
    for values of unknown range.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, what)
    if isinstance(source, np.ndarray):
        return _from_array(source, what)
    if hasattr(source, "detach"):
        return _from_tensor(source, what)
    if isinstance(source, list | tuple):
        raise RequestError(f"{what} is a {type(source).__name__} of {len(source)}: give one picture for all prompts")
    if not isinstance(source, str | os.PathLike) and not hasattr(source, "read"):
        kind = f"{type(source).__module__}.{type(source).__name__}"
        raise RequestError(f"{what} is a {kind}: give a path, a PIL picture or a numpy array")
    name = f"{what} {source}" if str(source).isprintable() else f"{what} {str(source)!r}"
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise RequestError(f"{name} is {size}: at most {MAX_PIXELS >> 20} Mpixels are read; shrink it")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise RequestError(f"{name} has {frames} frames: save the one that you mean as a picture")
            return _rgb(ImageOps.exif_transpose(image), name)
    except (RequestError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise RequestError(f"{name} does not exist: {FORMATS}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RequestError(f"{name} cannot be read as a picture: {FORMATS}") from error
    except Exception as error:  # decoders of damaged files raise many kinds
        raise RequestError(f"{name} cannot be read as a picture ({reason(error)}): {FORMATS}") from error


def _from_tensor(tensor: Any, what: str) -> Image.Image:
    """Return PyTorch's tensor [3, H, W], [1, H, W] or [H, W] in [0, 1] as a picture; one below 0 is in [-1, 1]."""
    array = np.asarray(tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu())
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim == 3 and array.shape[0] not in (1, 3):
        raise RequestError(f"{what} is a tensor of shape {list(tensor.shape)}: give one picture as [3, H, W] or [H, W]")
    array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if array.dtype.kind == "f" and array.size and -1 <= array.min() < 0:
        array = (array + 1) / 2
    return _from_array(array, what)


def _from_array(array: Array, what: str) -> Image.Image:
    """Return an array of bytes, or of floats in [0, 1], as a picture; leading and last axes of size 1 may stand."""
    shape = list(array.shape)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3) or not array.size:
        raise RequestError(f"{what} has shape {shape}: give one picture as [H, W, 3] or [H, W]")
    if array.dtype == bool:
        array = array.astype(np.float32)
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise RequestError(f"{what} is a {array.dtype} array outside [0, 1]: scale it, or give uint8")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def _rgb(image: Image.Image, what: str) -> Image.Image:
    """Return a picture of any mode as RGB; modes of more than 8 bits are scaled, not clipped."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise RequestError(f"{what} has whole numbers outside 0 to 65535: save it with 8 or 16 bits a channel")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image, np.float32), what)
    return image.convert("RGB")


def image_pixels(image: Image.Image, height: int, width: int) -> Pixels:
    """Return a picture as uint8 [height, width, 3], resized with Lanczos when it has another size."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image, dtype=np.uint8)


def pixel_mask(image: Image.Image, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return a mask as bool [1, height, width]: true where it is at least half white."""
    gray = image.convert("L")
    if gray.size != (width, height):
        gray = gray.resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(gray, np.float32) / 255 >= 0.5)[None]


def latent_mask(image: Image.Image, height: int, width: int, downscale: int) -> npt.NDArray[np.bool_]:
    """Return a mask in latent cells [1, height/downscale, width/downscale]: true where it is at least half white."""
    return pixel_mask(image, height, width)[:, ::downscale, ::downscale]  # nearest neighbour, as the field does it
