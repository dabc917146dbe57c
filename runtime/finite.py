"""Numbers that are not finite are an error: a decoder makes black pictures of them."""

from __future__ import annotations

import numpy as np

from ..engines.device import Array, Stream
from ..engines.errors import EngineError
from .loop.workspace import Workspace

NOT_FINITE = (
    "the {stage} gave {what} that are not finite: the bundle's weights or its precision cannot hold them; "
    "check it with latentrt verify, or export it in fp32"
)


def check_finite(workspace: Workspace, steps: int, output: Array, decode: bool, stream: Stream) -> None:
    """Raise `EngineError` with the stage whose numbers are not finite; `output` is what a finished batch gave."""
    latents = workspace.loop.latents(steps).read(stream) if decode else output
    if not np.isfinite(latents).all():
        raise EngineError(NOT_FINITE.format(stage="denoiser", what="latents"))
    suspicious = not np.isfinite(output).all() if output.dtype.kind == "f" else not output.any()
    if decode and suspicious:
        check_pixels(workspace.pictures["pixels"].read(stream))


def check_pixels(pixels: Array) -> None:
    """Raise `EngineError` for pictures of a decoder that are not finite."""
    if not np.isfinite(pixels).all():
        raise EngineError(NOT_FINITE.format(stage="decoder", what="pixels"))
