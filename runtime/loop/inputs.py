"""A request's numbers on the host: initial latents, drawn noise and packed step tables."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.device import Array
from ..sampling.noise import Generator
from ..sampling.step_table import STEP_INPUTS, StepOption, StepTable
from . import generators
from .pack import pack

Latents = npt.NDArray[np.float32]

ROWS = (
    *("weights", "clip_weights", "original_weights", "input_scales", "timesteps", "next_rows", "noise_index"),
    *(name for names in STEP_INPUTS.values() for name in names),
)
"""Arrays with one line for each row of the packed tables."""

ROW_BUCKET, DRAW_BUCKET = 64, 16


@dataclass(frozen=True)
class InitialImage:
    """Pictures to start from: their latent moments [n, C, h, w], and where to repaint them, [m, h, w] or None.

    Image i of a request starts from picture i, modulo n, and its mask is i, modulo m.
    """

    mean: Latents
    std: Latents
    mask: npt.NDArray[np.bool_] | None = None
    masked: tuple[Latents, Latents] | None = None
    """Latent moments [k, C, h, w] of the pictures without what their masks cover, for a denoiser that reads them."""

    @property
    def encoded(self) -> int:
        """How many masked pictures diffusers encodes, as inpainting checkpoints read them."""
        return 0 if self.mask is None else max(len(self.mean), len(self.mask))

    def beside(self, images: npt.NDArray[np.int_], drawn: Latents) -> Latents:
        """Return what the denoiser reads of images beside their latents, [n, 1 + C, h, w]: mask and masked picture.

        `drawn` [n, C, h, w] is the noise that the masked pictures' latents are sampled with.
        """
        assert self.mask is not None and self.masked is not None
        mean, std = (moment[images % len(moment)] for moment in self.masked)
        mask = self.mask[images % len(self.mask)][:, None].astype(np.float32)
        return np.concatenate([mask, mean + std * drawn], axis=1)


@dataclass(frozen=True)
class Draws:
    """What images draw: noise of the encoder [n, C, h, w], the first noise [n, C, h, w], and that of steps [n, K, ...].

    The encoder's is None without initial pictures, that of the steps where no step draws. `masked` [n, C, h, w] is the
    encoder's for masked pictures.
    """

    encoder: Latents | None
    first: Latents
    steps: Latents | None
    masked: Latents | None = None

    def rows(self, first: int, count: int, padded: int) -> Draws:
        """Return the draws of `count` images, the last one repeated until there are `padded`."""
        index = np.minimum(np.arange(first, first + padded), first + count - 1)
        parts = (self.encoder, self.steps, self.masked)
        encoder, steps, masked = (None if part is None else part[index] for part in parts)
        return Draws(encoder, self.first[index], steps, masked)


def blank_arrays(
    table: StepTable,
    count: int,
    shape: tuple[int, int, int],
    *,
    mix: tuple[float, ...],
    network_dtype: npt.DTypeLike,
    options: tuple[StepOption, ...] = (),
) -> dict[str, Array]:
    """Return the arrays of a batch before anything is drawn: complete in names, types and shapes, and quickly made.

    All are read-only, and the tables are those of every batch like this one. `shape` is [C, h, w], `mix` the weights of
    the branches of guidance, and `options` are those of the step graph.
    """
    packed = _packed(table, count, mix, options)
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


def draw_each(
    sources: Sequence[Any],
    table: StepTable,
    shape: tuple[int, ...],
    initial: InitialImage | None = None,
    given: Latents | None = None,
    from_noise: bool = False,
) -> Draws:
    """Draw for images [C, h, w] with a source each, in the order in which diffusers draws for a batch of one.

    `given` [n, C, h, w] stands in for the first noise, which is then not drawn. `from_noise` starts from it alone: a
    denoiser that reads masked pictures then does without the latents of whole ones.
    """
    count = len(sources)
    encoder = np.empty((count, *shape), np.float32) if _encodes(initial, from_noise) else None
    masked = None if initial is None or initial.mask is None else np.empty((count, *shape), np.float32)
    first = np.empty((count, *shape), np.float32) if given is None else given
    steps = np.empty((count, table.draw_count, *shape), np.float32) if table.draw_count else None
    generator = _generator()
    for i, source in enumerate(sources):
        generators.start(generator, source)
        if encoder is not None:
            encoder[i] = generator.randn(shape)
        if given is None:
            first[i] = generator.randn(shape)
        if masked is not None:
            masked[i] = generator.randn(shape)  # diffusers does so also where the denoiser reads no masked picture
        for slot in range(table.draw_count):
            assert steps is not None
            steps[i, slot] = generator.randn(shape)
        generators.stop(generator, source)
    return Draws(encoder, first, steps, masked)


def draw_together(
    source: Any,
    table: StepTable,
    shape: tuple[int, ...],
    initial: InitialImage | None = None,
    given: Latents | None = None,
    from_noise: bool = False,
) -> Draws:
    """Draw for the images [n, C, h, w] of a whole request from one source, in diffusers' order; see `draw_each`."""
    generator, count = _generator(), shape[0]
    generators.start(generator, source)
    encoder = masked = None
    if initial is not None and _encodes(initial, from_noise):
        pictures = generator.randn((len(initial.mean), *shape[1:]))
        encoder = pictures[np.arange(count) % len(pictures)]
    first = generator.randn(shape) if given is None else given
    if initial is not None and initial.encoded:
        pictures = generator.randn((initial.encoded, *shape[1:]))
        masked = pictures[np.arange(count) % len(pictures)]
    drawn = [generator.randn(shape) for _ in range(table.draw_count)]
    generators.stop(generator, source)
    return Draws(encoder, first, np.stack(drawn, axis=1) if drawn else None, masked)


def _encodes(initial: InitialImage | None, from_noise: bool) -> bool:
    return initial is not None and not (from_noise and initial.masked is not None)


def loop_arrays(
    blank: Mapping[str, Array],
    table: StepTable,
    draws: Draws,
    *,
    initial: InitialImage | None = None,
    first_image: int = 0,
    from_noise: bool = False,
) -> dict[str, Array]:
    """Return the arrays of one batch by the names of the loop's tensors: the blank ones with what is drawn for it.

    `first_image` is the index of the batch's first image in its request. `from_noise` starts from pure noise although
    there is an initial picture (inpainting at full strength, or from latents).
    """
    noise = draws.first
    count, shape = len(noise), noise.shape[1:]
    images = first_image + np.arange(count)
    start = np.zeros((count, *shape), np.float32)
    if initial is not None and draws.encoder is not None:
        which = images % len(initial.mean)
        start = initial.mean[which] + initial.std[which] * draws.encoder
    if initial is None or from_noise:
        latents = noise * np.float32(table.init_noise_sigma)
    else:
        signal, sigma = table.original[0].astype(np.float32)
        latents = signal * start + sigma * noise
    drawn = blank["noise"]
    if draws.steps is not None:
        drawn = np.zeros(blank["noise"].shape, np.float32)
        drawn[:, : table.draw_count] = draws.steps
    model_input = (blank["input_scales"][blank["row"]] * latents).astype(blank["model_input"].dtype)
    arrays = {
        **blank,
        "latents": latents,
        "history": np.zeros(blank["history"].shape, np.float32),
        "model_input": model_input[blank["image_of_row"]],
        "noise": drawn,
    }
    if initial is not None and initial.mask is not None and initial.masked is None:
        arrays["original"] = np.stack([start, noise], axis=1)
        arrays["mask"] = initial.mask[images % len(initial.mask)][:, None]
    return arrays


def go_on() -> Generator:
    """Return a generator of its own that goes on where this thread's last draw ended."""
    drawn, fresh = _generator(), Generator(0)
    fresh.resume(drawn.seed, *drawn.state())
    return fresh


def _generator() -> Generator:
    """Return this thread's generator, to be restarted for each image: making one gathers entropy that nobody uses."""
    if not hasattr(_thread, "generator"):
        _thread.generator = Generator(0)
    generator: Generator = _thread.generator
    return generator


_thread = threading.local()


@lru_cache(maxsize=32)
def _packed(table: StepTable, count: int, mix: tuple[float, ...], options: tuple[StepOption, ...]) -> dict[str, Array]:
    """Return the packed rows of one table for every image of a batch, read-only: most requests share them."""
    packed: dict[str, Any] = pack([table] * count, [mix] * count, options)
    packed |= {name: _padded(packed[name]) for name in ROWS if name in packed}
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
