"""Rows of the step graph and what it must give for them, in closed form: it comes from no module."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..engines.bundle import Precision
from ..engines.device import Array

__all__ = ["LIMITS", "step_rows"]

LIMITS: Mapping[str, str] = {
    "row": "T",
    "next_rows": "T",
    "noise_index": "D",
    "rows_of_image": "R",
    "image_of_row": "B",
}
"""The index inputs of the step graph and the sizes that they stay below."""

IMAGES, BRANCHES, ROWS, HISTORY, DRAWS, HEIGHT, WIDTH = 2, 2, 3, 2, 2, 5, 6


def step_rows(precision: Precision, channels: int) -> dict[str, Array]:
    """Return inputs of the step graph and its outputs for them, computed in float64 from its docstring's formula."""
    random = np.random.RandomState(0)  # its numbers are the same in every release of numpy
    images, branches, rows, columns = IMAGES, BRANCHES, ROWS, 3 + BRANCHES + HISTORY

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    picture = (channels, HEIGHT, WIDTH)
    network = np.dtype(np.float16 if precision == "fp16" else np.float32)
    given: dict[str, Array] = {
        "latents": normal(images, *picture),
        "history": normal(images, HISTORY, *picture),
        "prediction": normal(images * branches, *picture).astype(network),
        "row": np.array([0, 1]),
        "weights": normal(rows, 1 + HISTORY, columns, 1, 1, 1),
        "clip_weights": normal(rows, 1 + branches, 1, 1, 1),
        "original_weights": normal(rows, 2, 1, 1, 1),
        "input_scales": normal(rows, 1, 1, 1),
        "timesteps": 1000 * random.random_sample(rows).astype(np.float32),
        "next_rows": np.array([1, 2, 0]),
        "noise_index": np.array([1, 0, 1]).reshape(rows, 1, 1),
        "rows_of_image": np.array([[0, 2], [1, 3]]),
        "image_of_row": np.array([0, 1, 0, 1]),
        "noise": normal(images, DRAWS, *picture),
        "original": normal(images, 2, *picture),
        "mask": normal(images, 1, HEIGHT, WIDTH) > 0,
    }
    lines, following = [], given["next_rows"][given["row"]]
    for image, row in enumerate(given["row"]):
        state = np.stack([given["latents"][image], *given["prediction"][given["rows_of_image"][image]]]).astype(float)
        clipped = np.clip((given["clip_weights"][row] * state).sum(0), -1, 1)
        noise = given["noise"][image, given["noise_index"][row, 0, 0]]
        basis = np.concatenate([state, [noise, clipped], given["history"][image]])
        lines.append((given["weights"][row] * basis).sum(1))
    sampled, kept = np.stack(lines), (given["original"] * given["original_weights"][following].astype(float)).sum(1)
    latents = np.where(given["mask"], sampled[:, 0], kept)
    scaled = latents * given["input_scales"][following]
    return given | {
        "next_latents": latents.astype(np.float32),
        "next_history": sampled[:, 1:].astype(np.float32),
        "next_model_input": scaled[given["image_of_row"]].astype(network),
        "next_timestep": given["timesteps"][following][given["image_of_row"]],
        "next_row": following,
    }
