"""The shift of flow schedules for the size of a picture, as a scheduler's config has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engines.bundle import ShiftLine
from ..engines.errors import CheckpointError
from .checkpoints.configs import NUMBER, shown

USUAL = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""What diffusers' pipelines take where a config is silent."""


def shift_line(scheduler: Mapping[str, Any], **usual: float) -> ShiftLine:
    """Return the line through a config's two shifts (diffusers' `calculate_shift`).

    `usual` is what the pipeline takes where the config is silent, if it is not the usual. Raises `CheckpointError` for
    values that make none.
    """
    found = {key: scheduler.get(key, number) for key, number in (USUAL | usual).items()}
    few, many, first, last = found.values()
    if not all(map(NUMBER.fits, found.values())) or few == many:
        raise CheckpointError(f"the scheduler's config has {shown(found)}: give two numbers of tokens and two shifts")
    slope = (last - first) / (many - few)
    return ShiftLine(slope=slope, offset=first - slope * few)
