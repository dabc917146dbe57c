"""Defaults of checkpoints that were distilled to few steps, where their own configs give them away."""

from __future__ import annotations

import logging
from typing import Any

from .checkpoints.checkpoint import Checkpoint

CONSISTENT = ("LCMScheduler", "TCDScheduler")
"""Schedulers of consistency models (Luo et al. 2023, Zheng et al. 2024), which nothing else is used with."""
STEPS = 4
"""Of 1 to 8 that such checkpoints are made for; their files do not say how many."""
EMBEDDED_SCALE = 8.5
"""What diffusers' pipeline of latent consistency models gives to a U-Net that reads the guidance scale."""

log = logging.getLogger(__name__)


def few_step_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the steps and the guidance scale for a U-Net that its configs say is distilled, else nothing.

    Signs are a scheduler for consistency models, a guidance embedding (`time_cond_proj_dim`), and the ancestral Euler
    steps at trailing timesteps that Turbo is published with; ordinary models with trailing timesteps predict v, from
    pure noise. Lightning is published with plain Euler steps at them, which ordinary models are saved with as well:
    that is a hint in the log, and no more.
    """
    scheduler = checkpoint.scheduler
    kind = scheduler.get("_class_name")
    trailing = (
        scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr")
    )
    scale = EMBEDDED_SCALE if checkpoint.config("unet").get("time_cond_proj_dim") is not None else 0.0
    if not (kind in CONSISTENT or (trailing and kind == "EulerAncestralDiscreteScheduler") or scale):
        if trailing and kind == "EulerDiscreteScheduler":
            log.warning(
                "%s may be a model of few steps, by the trailing timesteps of its scheduler: give --steps and "
                "--guidance if its authors name some",
                checkpoint.name,
            )
        return {}
    log.warning(
        "%s is taken for a model of few steps by its configs: requests that name none get %d steps and the guidance "
        "scale %g; give --steps and --guidance if its authors say otherwise",
        checkpoint.name,
        STEPS,
        scale,
    )
    return {"default_num_inference_steps": STEPS, "default_guidance_scale": scale}
