"""Configs as diffusers' Stable Diffusion pipelines mend them when they open a checkpoint.

A pipeline's constructor rewrites configs that old checkpoints were saved with. A key that a config lacks counts as the
default of its class. Read in `StableDiffusionPipeline`, `…Img2ImgPipeline` and `…InpaintPipeline` of diffusers 0.42.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

INPAINT = "StableDiffusionInpaintPipeline"
AS_THEY_ARE = ("LatentConsistencyModelPipeline",)
"""Pipelines that mend nothing."""
SMALLEST_SAMPLE = 64

log = logging.getLogger(__name__)


def mended_scheduler(config: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """Return a scheduler config as the pipeline class `pipeline` leaves it.

    All that mend begin timesteps at an offset of 1. Inpainting skips PNDM's Runge-Kutta steps; the others leave samples
    unclipped.
    """
    if pipeline in AS_THEY_ARE:
        return dict(config)
    complete = {**_defaults(config.get("_class_name")), **config}
    wanted: dict[str, Any] = {}
    if complete.get("steps_offset", 1) != 1:
        wanted["steps_offset"] = 1
    if pipeline == INPAINT:
        if complete.get("skip_prk_steps") is False:
            wanted["skip_prk_steps"] = True
    elif complete.get("clip_sample") is True:
        wanted["clip_sample"] = False
    if wanted:
        log.info("the scheduler config is taken with %s, as %s does", wanted, pipeline)
    return {**config, **wanted}


def mended_sample_size(unet: Mapping[str, Any]) -> Any:
    """Return the U-Net's sample size; versions before 0.9 wrote one below 64 for models of 64."""
    size, version = unet.get("sample_size"), unet.get("_diffusers_version")
    if isinstance(size, int) and size < SMALLEST_SAMPLE and isinstance(version, str) and _before_0_9(version):
        return SMALLEST_SAMPLE
    return size


def _before_0_9(version: str) -> bool:
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and (int(release[1]), int(release[2])) < (0, 9)


def _defaults(class_name: Any) -> dict[str, Any]:
    import diffusers

    kind = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(kind, type):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
