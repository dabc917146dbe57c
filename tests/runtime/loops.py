"""How diffusers' pipelines drive the schedulers that need more than `step(prediction, t, latents)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Step = Callable[[int, Any, Any], Any]


def ends(scheduler: Any) -> bool:
    """Tell whether the last of the timesteps only ends the run (Stable Cascade's and SANA-Sprint's pipelines)."""
    return type(scheduler).__name__ in ("DDPMWuerstchenScheduler", "SCMScheduler")


def schedule(scheduler: Any, steps: int) -> dict[str, Any]:
    """Return what else the pipeline gives to `set_timesteps`."""
    if type(scheduler).__name__ == "DDPMWuerstchenScheduler" and not hasattr(scheduler, "order"):
        scheduler.order = 1
    if type(scheduler).__name__ == "UnCLIPScheduler":
        scheduler.order = 1
    if type(scheduler).__name__ == "SCMScheduler":  # as SanaSprintPipeline for two steps, and for others as it asks
        return {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3 if steps == 2 else None}
    return {}


def step(scheduler: Any, timesteps: Any, keywords: dict[str, Any]) -> Step:
    """Return the step of a pipeline's loop: index, prediction, latents -> latents."""
    loop: Step
    name = type(scheduler).__name__
    if name == "DDPMWuerstchenScheduler":

        def loop(i: int, prediction: Any, latents: Any) -> Any:
            return scheduler.step(prediction, timesteps[i].expand(1), latents, return_dict=False, **keywords)[0]

    elif name == "UnCLIPScheduler":

        def loop(i: int, prediction: Any, latents: Any) -> Any:
            last = i + 1 == len(timesteps)
            previous = None if last else timesteps[i + 1]
            keywords["prev_timestep"] = previous
            return scheduler.step(prediction, timesteps[i], latents, return_dict=False, **keywords)[0]

    elif name == "SCMScheduler":  # latents, predictions and what follows in units of sigma_data

        def loop(i: int, prediction: Any, latents: Any) -> Any:
            unit = scheduler.config.sigma_data
            return (
                scheduler.step(unit * prediction, timesteps[i], unit * latents, return_dict=False, **keywords)[0] / unit
            )

    elif name == "CogVideoXDPMScheduler":
        old = [None]

        def loop(i: int, prediction: Any, latents: Any) -> Any:
            before = timesteps[i - 1] if i > 0 else None
            latents, old[0] = scheduler.step(
                prediction, old[0], timesteps[i], before, latents, return_dict=False, **keywords
            )
            return latents

    else:

        def loop(i: int, prediction: Any, latents: Any) -> Any:
            return scheduler.step(prediction, timesteps[i], latents, return_dict=False, **keywords)[0]

    return loop
