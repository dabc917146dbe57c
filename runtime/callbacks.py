"""What a caller may hang into a request: progress, a look at every step, finished pictures as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engines.device import Array, Stream
from ..engines.errors import RequestError
from ..engines.progress import Progress, silent
from .arguments import STEP_TENSORS
from .loop.denoise import Mode
from .loop.workspace import Workspace, padded
from .request import GenerationRequest
from .sampling.step_table import StepTable

StepValues = dict[str, Any]
"""`{"latents": float32 [B, C, h, w]}`."""

StepCallback = Callable[[Any, int, float, StepValues], "StepValues | None"]
"""Called with the pipeline, the step's index, its timestep and the step's values; may return replaced latents."""

LegacyCallback = Callable[[int, float, Any], Any]
"""diffusers' older callback: called with the step's index, its timestep and the latents."""

BatchCallback = Callable[[GenerationRequest, int, Sequence[Any]], None]
"""Called with the complete request, the index of the batch's first image in it, and the batch's images."""


@dataclass(frozen=True)
class Listeners:
    """Who hears of the steps of a request."""

    on_step_end: Callable[[int, float, StepValues], StepValues | None] | None
    legacy: LegacyCallback | None
    progress: Progress
    stopped: Callable[[], bool]
    """Tells whether the request is to end after the step that was run."""


def step_hook(
    workspace: Workspace, table: StepTable, stream: Stream, listeners: Listeners, images: int, mode: Mode
) -> Callable[[int], bool] | None:
    """Return what the loop calls after each step, or None when nobody listens and more than a step is captured.

    Callbacks see the first `images` of the workspace's batch: what follows is thrown away. The hook only waits for the
    device when there is a callback to show latents to, and is true when the request is to end there. What a callback
    raises ends the request; the pipeline can be used again.
    """
    asked = listeners.on_step_end is not None or listeners.legacy is not None
    if not asked and listeners.progress is silent and mode in ("loop", "request"):
        return None

    def on_step(index: int) -> bool:
        listeners.progress("denoising", index + 1, len(table))
        if asked:
            latents, timestep = workspace.loop.latents(index + 1).read(stream), float(table.timesteps[index])
            batch, latents = len(latents), latents[:images]
            if listeners.on_step_end is not None:
                replaced = _replaced(listeners.on_step_end(index, timestep, {"latents": latents}), latents.shape)
                if replaced is not None:
                    latents = replaced
                    scale = float(table.input_scales[min(index + 1, len(table) - 1)])
                    workspace.loop.replace_latents(index + 1, padded(latents, batch), scale, stream)
            if listeners.legacy is not None:
                listeners.legacy(index, timestep, latents)
        return listeners.stopped()

    return on_step


def _replaced(returned: Any, shape: tuple[int, ...]) -> Array | None:
    """Return the latents that a callback put in place of those it saw; raises `RequestError` for anything else."""
    if returned is None:
        return None
    if not isinstance(returned, dict):
        raise RequestError(f"callback_on_step_end returned {type(returned).__name__}: return a dict, or nothing")
    if others := [name for name in returned if name not in STEP_TENSORS]:
        raise RequestError(f"callback_on_step_end returned {others[0]!r}: only latents can be replaced")
    if returned.get("latents") is None:
        return None
    try:
        latents = np.asarray(returned["latents"], np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # of lists that are no array, and of tensors elsewhere
        raise RequestError("callback_on_step_end returned latents that numpy cannot read: return an array") from error
    if latents.shape != shape or not np.isfinite(latents).all():
        raise RequestError(
            f"callback_on_step_end returned latents {list(latents.shape)}: return finite latents of shape {list(shape)}"
        )
    return latents
