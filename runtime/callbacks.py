"""What a caller may hang into a request: progress, a look at every step, finished pictures as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engines.device import Stream
from ..engines.errors import RequestError
from ..engines.progress import Progress, silent
from .loop.workspace import Workspace, padded
from .request import GenerationRequest
from .sampling.step_table import StepTable

StepValues = dict[str, Any]
"""`{"latents": float32 [B, C, h, w]}`."""

StepCallback = Callable[[Any, int, float, StepValues], "StepValues | None"]
"""Called with the pipeline, the step's index, its timestep and the step's values; may return replaced latents."""

BatchCallback = Callable[[GenerationRequest, int, Sequence[Any]], None]
"""Called with the complete request, the index of the batch's first image in it, and the batch's images."""


def step_hook(
    workspace: Workspace,
    table: StepTable,
    stream: Stream,
    callback: Callable[[int, float, StepValues], StepValues | None] | None,
    progress: Progress,
    images: int,
) -> Callable[[int], None] | None:
    """Return what the loop calls after each step, or None when nobody listens and steps need not be told apart.

    The callback sees the first `images` of the workspace's batch: what follows is thrown away. The hook only waits for
    the device when there is a callback to show latents to. What the callback raises ends the request; the pipeline can
    be used again.
    """
    if callback is None and progress is silent:
        return None

    def on_step(index: int) -> None:
        progress("denoising", index + 1, len(table))
        if callback is None:
            return
        latents = workspace.loop.latents(index + 1).read(stream)
        batch, latents = len(latents), latents[:images]
        replaced = callback(index, float(table.timesteps[index]), {"latents": latents})
        if replaced is not None and not isinstance(replaced, dict):
            raise RequestError(f"callback_on_step_end returned {type(replaced).__name__}: return a dict, or nothing")
        if (replaced or {}).get("latents") is not None:
            latents_after = np.asarray((replaced or {})["latents"], np.float32)
            if latents_after.shape != latents.shape or not np.isfinite(latents_after).all():
                what = f"latents {list(latents_after.shape)}"
                raise RequestError(
                    f"callback_on_step_end returned {what}: return finite latents of shape {list(latents.shape)}"
                )
            scale = float(table.input_scales[min(index + 1, len(table) - 1)])
            workspace.loop.replace_latents(index + 1, padded(latents_after, batch), scale, stream)

    return on_step
