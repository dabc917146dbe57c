"""Numbers of a request that graphs read beside token ids, as the bundle's manifest lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle
from ...engines.device import Array
from ..request import GenerationRequest


def number_inputs(bundle: Bundle, request: GenerationRequest, positive: int, negative: int = 0) -> dict[str, Array]:
    """Return the manifest's inputs of kind `numbers` for a complete request, each [R, N], by graph input.

    Rows are so many for the negative prompt, and then so many for the prompt.
    """
    types = {spec.name: spec.dtype for graph in bundle.manifest.graphs for spec in graph.inputs}
    numbers, arrays = numbers_of(request), {}
    for info in bundle.manifest.inputs:
        sides = ((info.values if info.negative is None else info.negative, negative), (info.values, positive))
        rows = [np.tile(_row(values, numbers, types[info.name]), (count, 1)) for values, count in sides]
        arrays[info.name] = np.concatenate(rows)
    return arrays


def numbers_of(request: GenerationRequest) -> dict[str, float]:
    """Return every number of a complete request that a manifest may name.

    Sizes that are not given are the picture's; those of the negative prompt are the prompt's, unless the request has
    both its original and its target size (diffusers' rule).
    """
    size = (request.height or 0, request.width or 0)
    sizes = {
        "original": request.original_size or size,
        "crop": request.crops_coords_top_left,
        "target": request.target_size or size,
    }
    negatives = sizes
    if request.negative_original_size is not None and request.negative_target_size is not None:
        negatives = {
            "original": request.negative_original_size,
            "crop": request.negative_crops_coords_top_left,
            "target": request.negative_target_size,
        }
    numbers: dict[str, float] = {}
    for prefix, each in (("", sizes), ("negative_", negatives)):
        for name, pair in each.items():
            sides = ("top", "left") if name == "crop" else ("height", "width")
            numbers |= {f"{prefix}{name}_{side}": value for side, value in zip(sides, pair, strict=True)}
    return numbers | {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": request.num_inference_steps or 0,
        "guidance_scale": request.guidance_scale or 0.0,
        "true_cfg_scale": request.true_cfg_scale,
        "negative_given": float(request.negative_given),
        "aesthetic_score": request.aesthetic_score,
        "negative_aesthetic_score": request.negative_aesthetic_score,
    }


def _row(values: Sequence[str | float], numbers: Mapping[str, float], dtype: npt.DTypeLike) -> Array:
    return np.array([numbers[value] if isinstance(value, str) else value for value in values], dtype)
