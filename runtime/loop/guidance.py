"""Guidance that is not the same at every step: which branches of it the network is asked for at which.

Which steps these are follows from their numbers alone, so the tables hold it, and the loop knows before it starts of
how many rows the denoiser is asked at a step.

In part: the other steps ask for the prompt's rows only.

    start, stop   shares of the run between which it is guided (Kynkaanniemi et al. 2024: guidance between two noise
                  levels); the steps are int(start N) up to int(stop N), as in diffusers' guiders
    reuse         share of the run after which what guidance adds is that of the last step before

With skipped layers: some steps ask for the prompt a second time, of the network without some of its layers, and move
away from what it says, by scale (prediction - that without them), as in diffusers.

    start, stop   shares of the run between which that is so: the steps above start N and below stop N
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...engines.errors import RequestError
from ..sampling.step_table import HISTORY, Guided, StepTable

__all__ = ["ALL", "NOTHING", "GuidedPart", "SkippedPart", "guided_in_part", "wide_rows", "with_skipped_layers"]

GuidedPart = tuple[float, float, float]
"""Shares of the run: where guidance starts, where it stops, and from where on it is reused."""
ALL: GuidedPart = (0.0, 1.0, 1.0)

SkippedPart = tuple[float, float, float]
"""The scale of what skipped layers add, and shares of the run: where it starts and where it stops."""
NOTHING: SkippedPart = (0.0, 0.0, 0.0)


def guided_in_part(table: StepTable, part: GuidedPart) -> StepTable:
    """Return a run that is guided in part, `table` itself where that is all of it.

    Raises `RequestError` where guidance is to be reused in rows that clip, as clipping knows no earlier rows.
    """
    start, stop, reuse = (int(share * len(table)) for share in part)
    found: list[Guided] = []
    for row in range(len(table)):
        if not start <= row < stop:
            found.append(Guided.NOT)
        elif row >= reuse and Guided.FULLY in found:
            found.append(Guided.AS_BEFORE)
        else:
            found.append(Guided.FULLY)
    if Guided.AS_BEFORE in found:
        table = _with_slot(table)
        if any(table.clip_limits[row] > 0 for row, guided in enumerate(found) if guided is Guided.AS_BEFORE):
            raise RequestError("guidance_reuse is given, and this sampler clips latents: leave one out")
    return table if set(found) <= {Guided.FULLY} else replace(table, guided=tuple(found))


def with_skipped_layers(table: StepTable, part: SkippedPart, calls: int) -> StepTable:
    """Return a run that moves away from the network without some layers, where it is guided fully.

    `calls` are the evaluations of a step of the sampler: diffusers counts evaluations, and takes shares of steps.
    """
    scale, start, stop = part
    steps = -(-len(table) // calls)
    guided = table.guided or (Guided.FULLY,) * len(table)
    found = [
        scale if start * steps < row < stop * steps and each is Guided.FULLY else 0.0 for row, each in enumerate(guided)
    ]
    return replace(table, skipped=tuple(found)) if any(found) else table


def wide_rows(table: StepTable, branches: int) -> range | None:
    """Return the rows that ask for all branches, which are one after the other, while the others ask for one less.

    `branches` are those of guidance by prompts. None: that is not so, or all of them ask for all.
    """
    asked, most = table.asked(branches), branches + table.skips
    if not asked or not {*asked} <= {most, most - 1}:
        return None
    rows = [row for row, count in enumerate(asked) if count == most]
    return range(rows[0], rows[-1] + 1) if rows else range(0)


def _with_slot(table: StepTable) -> StepTable:
    """Return a table with one more slot of history, which keeps what it has."""
    weights = np.pad(table.weights, ((0, 0), (0, 1), (0, 1)))
    weights[:, -1, -1] = 1
    clip = np.pad(table.clip_weights, ((0, 0), (0, 1)))
    assert weights.shape[2] == HISTORY + table.history + 1
    return replace(table, weights=weights, clip_weights=clip, added=table.history)
