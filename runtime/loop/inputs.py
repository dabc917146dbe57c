"""A request's numbers on the host: initial latents, drawn noise and packed step tables."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...engines.device import Array
from ...engines.errors import RequestError
from ..pictures.load import load_image
from ..sampling.noise import Generator
from ..sampling.step_table import StepTable, pack

Latents = npt.NDArray[np.float32]

ROWS = ("weights", "clip_weights", "original_weights", "input_scales", "timesteps", "next_rows", "noise_index")
"""Arrays with one line for each row of the packed tables."""

ROW_BUCKET, DRAW_BUCKET = 64, 16


@dataclass(frozen=True)
class InitialImage:
    """A picture to start from: its latent moments [1, C, h, w], and where to repaint it, [1, h, w] or None."""

    mean: Latents
    std: Latents
    mask: npt.NDArray[np.bool_] | None = None


def load_pictures(image: Any, mask: Any, strength: float | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Load the initial picture and the mask; raises `RequestError` for what makes no sense without a picture."""
    if image is None:
        for name, value in (("mask_image", mask), ("strength", strength)):
            if value is not None:
                raise RequestError(f"{name} was given without image: give the picture to start from as well")
        return None, None
    return load_image(image), None if mask is None else load_image(mask, "mask_image")


def blank_arrays(
    table: StepTable,
    count: int,
    shape: tuple[int, int, int],
    *,
    guidance_scale: float,
    branches: int,
    network_dtype: npt.DTypeLike,
) -> dict[str, Array]:
    """Return the arrays of a batch before anything is drawn: complete in names, types and shapes, and quickly made.

    All are read-only, and the tables are those of every batch like this one. `shape` is [C, h, w].
    """
    packed = _packed(table, count, guidance_scale, branches)
    rows = packed["image_of_row"]
    slots = max(1, -(-table.draw_count // DRAW_BUCKET) * DRAW_BUCKET)
    return {
        **packed,
        "latents": _filled(0.0, (count, *shape)),
        "history": _filled(0.0, (count, packed["weights"].shape[1] - 1, *shape)),
        "model_input": np.broadcast_to(np.zeros((), network_dtype), (len(rows), *shape)),
        "timestep": packed["timesteps"][packed["row"]][rows],
        "noise": _filled(0.0, (count, slots, *shape)),
        "original": _filled(0.0, (count, 2, *shape)),
        "mask": _filled(True, (count, 1, *shape[1:])),
    }


def loop_arrays(
    blank: Mapping[str, Array],
    table: StepTable,
    seeds: Sequence[int],
    *,
    initial: InitialImage | None = None,
    repaint_all: bool = False,
) -> dict[str, Array]:
    """Return the arrays of one batch by the names of the loop's tensors: the blank ones with what is drawn for it.

    Image i draws all its noise from its own generator, in the order in which diffusers draws it for a batch of one.
    `repaint_all` starts from pure noise although there is an initial image (inpainting at full strength).
    """
    count, shape = len(seeds), blank["latents"].shape[1:]
    noise = np.empty((count, *shape), np.float32)
    drawn = np.zeros(blank["noise"].shape, np.float32) if table.draw_count else blank["noise"]
    start = np.zeros((count, *shape), np.float32)
    generator = _generator()
    for i, seed in enumerate(seeds):
        generator.restart(seed)
        if initial is not None:
            start[i] = initial.mean[0] + initial.std[0] * generator.randn(shape)
        noise[i] = generator.randn(shape)
        if initial is not None and initial.mask is not None:
            generator.randn(shape)  # diffusers also encodes the masked picture, which only inpainting checkpoints read
        for slot in range(table.draw_count):
            drawn[i, slot] = generator.randn(shape)
    if initial is None or repaint_all:
        latents = noise * np.float32(table.init_noise_sigma)
    else:
        signal, sigma = table.original[0].astype(np.float32)
        latents = signal * start + sigma * noise
    model_input = (blank["input_scales"][blank["row"]] * latents).astype(blank["model_input"].dtype)
    arrays = {
        **blank,
        "latents": latents,
        "history": np.zeros(blank["history"].shape, np.float32),
        "model_input": model_input[blank["image_of_row"]],
        "noise": drawn,
    }
    if initial is not None and initial.mask is not None:
        arrays["original"] = np.stack([start, noise], axis=1)
        arrays["mask"] = np.repeat(initial.mask[None], count, axis=0)
    return arrays


def _generator() -> Generator:
    """Return this thread's generator, to be restarted for each image: making one gathers entropy that nobody uses."""
    if not hasattr(_thread, "generator"):
        _thread.generator = Generator(0)
    generator: Generator = _thread.generator
    return generator


_thread = threading.local()


@lru_cache(maxsize=32)
def _packed(table: StepTable, count: int, guidance_scale: float, branches: int) -> dict[str, Array]:
    """Return the packed rows of one table for every image of a batch, read-only: most requests share them."""
    packed: dict[str, Any] = pack([table] * count, [guidance_scale] * count, branches)
    packed |= {name: _padded(packed[name]) for name in ROWS}
    for array in packed.values():
        array.flags.writeable = False
    return packed


@lru_cache(maxsize=16, typed=True)
def _filled(value: bool | float, shape: tuple[int, ...]) -> Array:
    """Return a read-only view of one value in any shape: float32, or bool for a truth value."""
    return np.broadcast_to(np.array(value, bool if isinstance(value, bool) else np.float32), shape)


def _padded(array: Array) -> Array:
    """Round the number of table rows up, so that requests with other step counts use the same buffers and captures."""
    missing = -len(array) % ROW_BUCKET
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
