"""Guidance at some steps alone, or taken from earlier ones: the others ask the network for the prompt's rows only.

Which steps these are follows from their numbers alone, so the tables hold it, and the loop knows before it starts which
of its two denoisers a step runs.

    start, stop   shares of the run between which it is guided (Kynkaanniemi et al. 2024: guidance between two noise
                  levels); the steps are int(start N) up to int(stop N), as in diffusers' guiders
    reuse         share of the run after which what guidance adds is that of the last step before
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...engines.errors import RequestError
from ..sampling.step_table import HISTORY, Guided, StepTable

__all__ = ["ALL", "GuidedPart", "guided_in_part", "guided_rows"]

GuidedPart = tuple[float, float, float]
"""Shares of the run: where guidance starts, where it stops, and from where on it is reused."""
ALL: GuidedPart = (0.0, 1.0, 1.0)


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


def guided_rows(table: StepTable) -> range | None:
    """Return the rows that are guided fully, which are one after the other; None: all."""
    if not table.guided:
        return None
    rows = [row for row, guided in enumerate(table.guided) if guided is Guided.FULLY]
    return range(rows[0], rows[-1] + 1) if rows else range(0)


def _with_slot(table: StepTable) -> StepTable:
    """Return a table with one more slot of history, which keeps what it has."""
    weights = np.pad(table.weights, ((0, 0), (0, 1), (0, 1)))
    weights[:, -1, -1] = 1
    clip = np.pad(table.clip_weights, ((0, 0), (0, 1)))
    assert weights.shape[2] == HISTORY + table.history + 1
    return replace(table, weights=weights, clip_weights=clip, added=table.history)
