"""A request's numbers on the host: initial latents, drawn noise and packed step tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engines.device import Array
from .noise import Generator
from .step_table import StepTable, pack

Latents = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InitialImage:
    """A picture to start from: the moments of its latents [1, C, h, w] and, for inpainting, a mask [1, h, w]."""

    mean: Latents
    std: Latents
    mask: Latents | None = None


def loop_arrays(
    table: StepTable,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    guidance_scale: float,
    branches: int,
    network_dtype: npt.DTypeLike,
    initial: InitialImage | None = None,
    repaint_all: bool = False,
) -> dict[str, Array]:
    """Return the arrays of one batch by the names of the loop's tensors.

    Image i draws all its noise from its own generator, in the order in which diffusers draws it for a batch of one.
    `shape` is [C, h, w]. `repaint_all` starts from pure noise although there is an initial image (inpainting at full
    strength).
    """
    count = len(seeds)
    original = np.zeros((count, *shape), np.float32)
    noise = np.empty((count, *shape), np.float32)
    drawn = np.zeros((count, max(1, table.draw_count), *shape), np.float32)
    for i, seed in enumerate(seeds):
        generator = Generator(seed)
        if initial is not None:
            original[i] = initial.mean[0] + initial.std[0] * generator.randn(shape)
        noise[i] = generator.randn(shape)
        if initial is not None and initial.mask is not None:
            generator.randn(shape)  # diffusers also encodes the masked picture, which only inpainting checkpoints read
        for slot in range(table.draw_count):
            drawn[i, slot] = generator.randn(shape)
    if initial is None or repaint_all:
        latents = noise * np.float32(table.init_noise_sigma)
    else:
        signal, sigma = table.known[0].astype(np.float32)
        latents = signal * original + sigma * noise
    packed: dict[str, Any] = pack([table] * count, [guidance_scale] * count, branches)
    model_input = latents * packed["input_scales"][:, 0, None, None, None]
    mask = np.ones((count, 1, *shape[1:]), np.float32)
    if initial is not None and initial.mask is not None:
        mask[:] = initial.mask
    return {
        **packed,
        "latents": latents,
        "history": np.zeros((count, packed["weights"].shape[2] - 1, *shape), np.float32),
        "model_input": np.tile(model_input, (branches, 1, 1, 1)).astype(network_dtype),
        "timestep": np.tile(packed["timesteps"][:, 0], branches),
        "step": np.zeros(count, np.int64),
        "noise": drawn,
        "original": original,
        "original_noise": noise,
        "mask": mask,
    }
