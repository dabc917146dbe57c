"""Requests before the first one: engines built, opened and bound, and steps captured, for the shapes of a service."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from ..engines.bundle import Manifest
from ..engines.errors import RequestError

ROUNDS = ("pil", "np")
"""Work runs as it is the first time, and is captured the second time; each reads other results."""

log = logging.getLogger(__name__)


def blank_request(manifest: Manifest, width: int, height: int) -> dict[str, Any]:
    """Return the arguments of a request of a size for nothing: no prompt, and a blank picture where one is needed."""
    request: dict[str, Any] = {"prompt": "", "seed": 0, "width": width, "height": height}
    if manifest.masked_input is not None:
        request["image"] = request["mask_image"] = np.zeros((height, width, 3), np.uint8)
        request["strength"] = 1.0  # its own leaves no step of one
    return request


def guided_requests(manifest: Manifest, scale: float) -> list[dict[str, Any]]:
    """Return the arguments of a request with a scale of guidance, and of one that also skips layers, where it may."""
    guidance = manifest.guidance
    asked: dict[str, Any] = {guidance.scale: scale, **({"negative_prompt": ""} if guidance.needs_negative else {})}
    if guidance.skipped is None or len(guidance.weights(scale, negative_given=True)) == 1:
        return [asked]
    return [asked, {**asked, "skip_guidance_layers": guidance.skipped.layers}]


def warm_up(
    pipe: Any, sizes: Sequence[tuple[int, int]], batches: Sequence[int], pictures: bool, arguments: dict[str, Any]
) -> None:
    """Run requests of every size (width, height) and batch, from pictures and with previews too; see `Pipeline`."""
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= pipe.max_batch:
            most = pipe.max_batch
            raise RequestError(f"batches has {batch!r}: give numbers from 1 to max_batch, which is {most}")
    manifest, before = pipe.bundle.manifest, pipe.session.evictions
    strength = _strength(manifest, arguments)
    with pipe.session.keep_all():
        for (width, height), batch in product(sizes, batches):
            request = {**blank_request(manifest, width, height), "prompt": [""] * batch, **arguments}
            request["strength"] = None if manifest.masked_input is None else strength
            of_picture = {"image": np.zeros((height, width, 3), np.uint8), "strength": strength}
            for output_type in ROUNDS:
                with pipe.session.turn():  # another thread's request may read it
                    pipe.session.prompts.clear()
                pipe(**request, output_type=output_type)
                if pipe.mode == "request":  # it is captured apart from one whose prompts are encoded already
                    pipe(**request, output_type=output_type)
            if pictures and pipe.bundle.has_graph("image_encoder"):
                for output_type in ROUNDS:
                    pipe(**request | of_picture, output_type=output_type, callback_on_step_end=_preview)
    if lost := pipe.session.evictions - before:
        log.warning("memory_budget has no room for all shapes: %d were let go of again", lost)


def _strength(manifest: Manifest, arguments: Mapping[str, Any]) -> Any:
    """Return the strength of requests from pictures: None, or 1 where the bundle's own leaves none of so few steps."""
    own = manifest.default_strength if manifest.masked_input is None else manifest.default_inpainting_strength
    steps = arguments["num_inference_steps"] or manifest.default_num_inference_steps
    none_left = isinstance(steps, int) and int(steps * own) < 1
    return 1.0 if none_left and arguments["strength"] is None else arguments["strength"]


def _preview(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
    pipe.decode(values["latents"])
