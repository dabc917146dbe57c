"""Requests before the first one: engines built, opened and bound, and steps captured, for the shapes of a service."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from ..engines.errors import RequestError

ROUNDS = ("pil", "np")
"""Work runs as it is the first time, and is captured the second time; each reads other results."""

log = logging.getLogger(__name__)


def warm_up(
    pipe: Any, sizes: Sequence[tuple[int, int]], batches: Sequence[int], pictures: bool, arguments: dict[str, Any]
) -> None:
    """Run requests of every size (width, height) and batch, from pictures and with previews too; see `Pipeline`."""
    if wrong := [batch for batch in batches if not 1 <= batch <= pipe.max_batch]:
        raise RequestError(f"batches has {wrong[0]}: give numbers from 1 to max_batch, which is {pipe.max_batch}")
    before = pipe.session.evictions
    with pipe.session.keep_all():
        for (width, height), batch in product(sizes, batches):
            request = {"prompt": [""] * batch, "seed": 0, "width": width, "height": height, **arguments}
            blank = np.zeros((height, width, 3), np.uint8)
            if pipe.bundle.manifest.masked_input is not None:
                request = {"image": blank, "mask_image": blank, **request}
            for output_type in ROUNDS:
                pipe.session.prompts.clear()
                pipe(**{**request, "strength": None}, output_type=output_type)
                if pipe.mode == "request":  # it is captured apart from one whose prompts are encoded already
                    pipe(**{**request, "strength": None}, output_type=output_type)
            if pictures and pipe.bundle.has_graph("image_encoder"):
                for output_type in ROUNDS:
                    pipe(**{**request, "image": blank}, output_type=output_type, callback_on_step_end=_preview)
    if lost := pipe.session.evictions - before:
        log.warning("memory_budget has no room for all shapes: %d were let go of again", lost)


def _preview(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
    pipe.decode(values["latents"])
