"""Tables of a batch laid out for the step graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..sampling.step_table import HISTORY, STEP_INPUTS, Guided, StepOption, StepTable

__all__ = ["branch_weights", "pack"]


def pack(
    tables: Sequence[StepTable], mixes: Sequence[Sequence[float]], options: Collection[StepOption] = ()
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Lay the rows of a batch out for the step graph: B images, G branches, T rows, H history slots (at least one).

    `mixes` [B][g] are the weights by which an image's branches become one prediction; `options` are the step graph's.
    Where a table skips layers, the branch without them is the first, and G = g + 1.

    Each image has its own run of rows, closed by a row that holds the latents; its counter starts at `row[b]` and
    follows `next_rows`.

    weights [T, 1 + H, K, 1, 1, 1]   columns: latents, G predictions, noise, clipped, history
    clip_weights [T, 1 + G, 1, 1, 1]   columns: latents, G predictions; scaled so that the clip is to [-1, 1]
    original_weights [T, 2, 1, 1, 1], input_scales [T, 1, 1, 1], timesteps [T], next_rows [T], noise_index [T, 1, 1]
    row [B]   the first row of each image
    rows_of_image [B, G], image_of_row [R]   network rows are branch-major: g * B + b

    A row that is not guided fully has other weights for the branches, see `Guided`, as has one that skips layers.

    With dynamic thresholding quantiles and largest [T, 1, 1, 1, 1], 0 and 1 in other rows; with learned variance
    log_deviations and log_deviation_slopes [T, 1, 1, 1, 1].
    """
    images, branches = len(tables), len(mixes[0]) + any(table.skips for table in tables)
    slots = max(1, *(table.history for table in tables))
    columns = 1 + branches + 2 + slots
    first, total = [], 0
    for table in tables:
        first.append(total)
        total += len(table) + 1
    weights = np.zeros((total, 1 + slots, columns))
    clip_weights = np.zeros((total, 1 + branches))
    original, scales, timesteps = np.zeros((total, 2)), np.ones(total), np.zeros(total)
    next_rows, noise_index = np.arange(total) + 1, np.zeros(total)
    more = {"quantiles": np.zeros(total), "largest": np.ones(total)}
    more |= {"log_deviations": np.zeros(total), "log_deviation_slopes": np.zeros(total)}
    for start, table, mix in zip(first, tables, mixes, strict=True):
        n, lines = len(table), 1 + table.history
        rows, hold = slice(start, start + n), start + n
        dynamic = table.quantiles >= 0
        limits = np.where((table.clip_limits > 0) & ~dynamic, table.clip_limits, 1.0)
        latents, prediction, noise, clipped, history = np.split(table.weights, [1, 2, 3, HISTORY], axis=2)
        mixed = branch_weights(table, mix, branches)
        parts = [latents, prediction * mixed[:, None], noise, clipped * limits[:, None, None], history]
        weights[rows, :lines, : columns - slots + table.history] = np.concatenate(parts, axis=2)
        _add_guidance(weights[rows], table, mix, branches)
        weights[hold, 0, 0] = 1
        clipped_form = [table.clip_weights[:, :1], table.clip_weights[:, 1:2] * mixed]
        clip_weights[rows] = np.concatenate(clipped_form, axis=1) / limits[:, None]
        original[start : hold + 1] = table.original
        scales[rows], scales[hold] = table.input_scales, table.input_scales[-1]
        timesteps[rows], timesteps[hold] = table.timesteps, table.timesteps[-1]
        next_rows[hold] = hold
        noise_index[rows] = np.maximum(np.cumsum(table.draws) - 1, 0)
        more["quantiles"][rows] = np.where(dynamic, table.quantiles, 0)
        more["largest"][rows] = np.where(dynamic, table.clip_limits, 1)
        more["log_deviations"][rows], more["log_deviation_slopes"][rows] = table.spreads.T
    floats = {
        "weights": weights[..., None, None, None],
        "clip_weights": clip_weights[..., None, None, None],
        "original_weights": original[..., None, None, None],
        "input_scales": scales[:, None, None, None],
        "timesteps": timesteps,
    }
    floats |= {name: more[name][:, None, None, None, None] for option in options for name in STEP_INPUTS[option]}
    rows_of_image = np.arange(branches) * images + np.arange(images)[:, None]
    indices = {
        "next_rows": next_rows,
        "noise_index": noise_index[:, None, None],
        "row": np.array(first),
        "rows_of_image": rows_of_image,
        "image_of_row": np.tile(np.arange(images), branches),
    }
    return {name: value.astype(np.float32) for name, value in floats.items()} | {
        name: value.astype(np.int64) for name, value in indices.items()
    }


def branch_weights(table: StepTable, mix: Sequence[float], branches: int) -> NDArray[np.float64]:
    """Return the weights of the branches in each row, [N, G]."""
    mixes = np.tile([*[0.0] * (branches - len(mix)), *mix], (len(table), 1))
    for row, guided in enumerate(table.guided):
        if guided is not Guided.FULLY:
            mixes[row] = [*[0.0] * (branches - 1), 1.0]
    for row, scale in enumerate(table.skipped):
        mixes[row, [0, -1]] += -scale, scale
    return mixes


def _add_guidance(weights: NDArray[np.float64], table: StepTable, mix: Sequence[float], branches: int) -> None:
    """Write the lines of the slot for what guidance adds, and let rows that are guided as before read it.

    What skipped layers add is not among it: rows that are guided as before skip none.
    """
    if table.added is None:
        return
    line, slot, first = 1 + table.added, 1 + branches + 2 + table.added, np.arange(1, 1 + branches)
    added = np.array([*[0.0] * (branches - len(mix)), *mix[:-1], mix[-1] - 1])
    for row, guided in enumerate(table.guided):
        if guided is Guided.FULLY:
            weights[row, line] = 0
            weights[row, line, first] = added
        elif guided is Guided.AS_BEFORE:
            weights[row, :line, slot] += weights[row, :line, first[-1]]
            weights[row, line + 1 :, slot] += weights[row, line + 1 :, first[-1]]
