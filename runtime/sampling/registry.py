"""Samplers by name: a scheduler config and a number of steps become a step table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ...engines.bundle import ScheduleRule
from ...engines.errors import LatentRTError, RequestError, SchedulerError, UnsupportedModelError, reason
from ..schedules.custom import checked_values
from ..schedules.flow import flow_schedule
from ..schedules.rule import applied
from ..schedules.schedule import Schedule
from .algebra import clean_and_noise, preconditioned
from .catalog import SAMPLERS, Sampler
from .k_diffusion import consistent
from .names import SHORT_NAMES
from .resolve import resolved, suffixes_of
from .step_table import StepOption, StepTable

__all__ = [
    "Churn",
    "SamplerDescription",
    "check_scheduler",
    "clean_factors",
    "describe",
    "names",
    "step_table",
    "takes_eta",
]

MAX_TRAIN_TIMESTEPS = 100_000
MOST_CONTINUOUS_STEPS = 1000


class Churn(NamedTuple):
    """Noise added at every step between two sigmas (Karras et al. 2022, algorithm 2; diffusers' names)."""

    s_churn: float = 0.0
    """How much noise, over the whole run."""
    s_tmin: float = 0.0
    """The least sigma at which noise is added."""
    s_tmax: float = float("inf")
    """The largest sigma at which noise is added."""
    s_noise: float = 1.0
    """The deviation of the noise."""


NO_CHURN = Churn()
CONSISTENCY = "CMStochasticIterativeScheduler"
PRECONDITIONED = (CONSISTENCY, "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Classes whose networks are preconditioned for the data's deviation (Karras et al. 2022)."""
UNSAID = {"DDPMWuerstchenScheduler": "epsilon", "IPNDMScheduler": "v_prediction", "SCMScheduler": "v_prediction"}
"""What networks predict of the classes whose configs do not say so; those of flows, the flow."""
WHOLE = (0.0, 1.0)
"""All of the training schedule."""
TYPICAL_STEPS = 4
"""A number of steps that every schedule takes, those of distilled models as well."""


@dataclass(frozen=True)
class SamplerDescription:
    """A sampler to choose from."""

    name: str
    """Its short name."""
    class_name: str
    """The diffusers class that it behaves like."""
    suffixes: tuple[str, ...]
    """What may stand behind the name and a _ to space the sigmas in another way."""
    order: int | None
    """How fast its error falls, at least: n times the steps, n**order times less."""
    meaning: str
    """The method and its source."""


def names() -> list[str]:
    """Return the short names of the samplers; those with sigmas to space also take _karras, _exponential or _beta."""
    return list(SHORT_NAMES)


def describe() -> list[SamplerDescription]:
    """Return every sampler that has a short name, with what it is and where it comes from."""
    return [
        SamplerDescription(name, short.class_name, suffixes_of(short.class_name), short.order, short.meaning)
        for name, short in SHORT_NAMES.items()
    ]


def step_table(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int | None,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
    mu: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    churn: Churn = NO_CHURN,
    rule: ScheduleRule | None = None,
    size: tuple[int, int] | None = None,
    share: tuple[float, float] = WHOLE,
) -> StepTable:
    """Build the table of a run from a diffusers `scheduler_config.json` and a number of steps.

    `sampler` replaces the config's own: a diffusers class name behaves as `Class.from_config(scheduler_config)`; a
    short name (`names()`) does the same, sets the options in its name, and leaves latents unclipped where the config
    is silent on clip_sample (diffusers' DDIM and DDPM would clip). `strength` < 1 (image-to-image) leaves out the first
    steps, as diffusers does: int(steps * strength) remain, and multistep samplers warm up again. `eta` (DDIM, TCD) adds
    noise, `churn` (Euler, EDM Euler, flow Heun) as well; `mu` shifts a schedule that asks for use_dynamic_shifting.

    `timesteps` or `sigmas`, decreasing, replace the schedule's own and set the number of steps, where the sampler's
    diffusers class takes them: with Euler's sigmas and the timesteps of Wuerstchen and SCM the last one ends the run.
    `rule` says what the checkpoint's pipeline hands to its scheduler, from the number of steps and `size`, (width,
    height) in pixels; what the caller gives goes before it.

    `share` is the part of the training schedule that is run, from 0, pure noise, to 1 (diffusers' denoising_start and
    denoising_end): two models may share the steps of a picture.

    Raises RequestError for numbers out of range, SchedulerError for a scheduler or option that no table expresses.
    """
    try:
        with np.errstate(all="ignore"):  # TableBuilder.table refuses what is not finite
            name, options = resolved(scheduler_config, sampler)
            chosen = SAMPLERS[name]
            options["most_steps"] = most_steps(options, chosen)
            steps = checked_steps(num_inference_steps, options) if num_inference_steps is not None else None
            options |= checked_eta(eta, chosen) | {"mu": mu, "churn": checked_churn(churn, name, chosen)}
            options["timesteps"] = checked_values("timesteps", timesteps, chosen.timesteps, name)
            options["sigmas"] = checked_values("sigmas", sigmas, chosen.sigmas, name)
            if rule is not None:
                options |= applied(rule, options, steps, size, on_flow=chosen.schedule is flow_schedule)
            steps = custom_steps(options, chosen, steps)
            start = first_step(name, steps, strength)
            schedule = chosen.schedule(options, steps)
            if share != WHOLE:
                return _share(chosen, schedule, options, share, evaluations_of_a_step(name))
            return chosen.build(replace(schedule, start=start), options)
    except LatentRTError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # a config of wrong types, lengths or signs
        raise SchedulerError(
            f"the scheduler config makes no schedule ({reason(error)}): export the checkpoint again, "
            "or choose another sampler"
        ) from error


def clean_factors(
    scheduler_config: Mapping[str, Any], sampler: str | None, table: StepTable, row: int
) -> tuple[float, float]:
    """Return (a, b) with x0 = a * latents + b * prediction: the clean latents that the prediction of a row speaks of.

    `table` is of that config and sampler. Latents that are not variance preserving are so where the network reads them.
    """
    name, options = resolved(scheduler_config, sampler)
    kind = UNSAID.get(name) or options.get("prediction_type", "flow_prediction")
    (signal, noise), scale = table.original[row], table.input_scales[row]
    latents, prediction = np.eye(2)
    if name in PRECONDITIONED:
        sigma = (scale**-2 - options["sigma_data"] ** 2) ** 0.5
        if name == CONSISTENCY:
            x0 = consistent(latents, prediction, sigma, options)
        else:
            x0 = preconditioned(kind, latents, prediction, sigma, options["sigma_data"])
    else:
        if scale != 1:
            signal, noise = scale, (1 - scale**2) ** 0.5
        falls = -1 if options.get("invert_sigmas") else 1  # then it is the way from noise to the picture
        x0, _ = clean_and_noise(kind, scale * latents, falls * prediction, signal, noise)
    return float(x0[0]), float(x0[1])


def _share(
    chosen: Sampler, schedule: Schedule, options: Mapping[str, Any], share: tuple[float, float], evaluations: int
) -> StepTable:
    """Return the rows of a share of the training schedule, cut at the same timesteps as diffusers cuts its own."""
    train, whole = options["num_train_timesteps"], chosen.build(schedule, options).timesteps
    first, last = (round(train - part * train) for part in share)
    skipped = 0
    if share[0] > 0:
        left = int((whole < first).sum())
        left += evaluations == 2 and left % 2 == 0
        skipped = len(whole) - left
    kept = len(whole) - skipped if share[1] == 1 else int((whole[skipped:] >= last).sum())
    if kept < 1:
        raise RequestError(
            f"denoising_start {share[0]} and denoising_end {share[1]} leave no step to run: give a wider share"
        )
    table = chosen.build(replace(schedule, start=skipped // evaluations), options)
    return table.cut(kept) if kept < len(table) else table


def evaluations_of_a_step(name: str) -> int:
    """Return how often a scheduler class asks the denoiser in a step of its own (diffusers' scheduler.order)."""
    return 2 if "Heun" in name or "KDPM2" in name else 1


def check_scheduler(
    scheduler_config: Mapping[str, Any], rule: ScheduleRule | None, size: tuple[int, int]
) -> tuple[StepOption, ...]:
    """Return what the tables of a checkpoint's own scheduler need of its step graph.

    `size` is the (width, height) in pixels that the checkpoint was trained for. Raises UnsupportedModelError, with the
    way out, for a scheduler that no step table expresses.
    """
    try:
        return step_table(scheduler_config, TYPICAL_STEPS, rule=rule, size=size).options
    except SchedulerError as error:
        raise UnsupportedModelError(
            f"the checkpoint's scheduler has no step table: {error}; "
            "change scheduler/scheduler_config.json, or the class in model_index.json, and export again"
        ) from error


def takes_eta(sampler: str, scheduler_config: Mapping[str, Any]) -> bool:
    """Tell whether a sampler, by any of its names, has the option eta."""
    return SAMPLERS[resolved(scheduler_config, sampler)[0]].takes_eta


def checked_eta(eta: float, chosen: Sampler) -> dict[str, float]:
    """Return the option eta, 0 for samplers that have none; raises RequestError unless it is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise RequestError(f"eta {eta} is out of range: give 0 (deterministic) to 1")
    return {"eta": eta if chosen.takes_eta else 0.0}


def checked_churn(churn: Churn, name: str, chosen: Sampler) -> Churn:
    """Return the churn; raises RequestError for negative numbers, or for a sampler that adds no noise this way."""
    if not all(number >= 0 for number in churn):
        raise RequestError(
            f"churn {tuple(churn)} is out of range: give s_churn, s_tmin, s_tmax and s_noise of 0 or more"
        )
    if churn.s_churn > 0 and not chosen.takes_churn:
        able = ", ".join(each for each, sampler in SAMPLERS.items() if sampler.takes_churn)
        raise RequestError(f"{name} takes no s_churn: choose {able}")
    return churn


def custom_steps(options: Mapping[str, Any], chosen: Sampler, steps: int | None) -> int:
    """Return the number of steps of the schedule that was given, or else the number that was asked for."""
    told, given = options["timesteps"], options["sigmas"]
    if told is not None and given is not None and (chosen.schedule is not flow_schedule or len(told) != len(given)):
        raise RequestError("timesteps and sigmas are given: give one of them")
    if told is not None:
        return checked_steps(len(told) - (chosen.timesteps or 0), options)
    if given is not None:
        return checked_steps(len(given) - (chosen.sigmas or 0), options)
    if steps is None:
        raise RequestError("num_inference_steps is not given: give it, or timesteps or sigmas")
    return steps


def most_steps(options: Mapping[str, Any], chosen: Sampler) -> int:
    """Return the largest number of steps: that of the training's, or more where a schedule is continuous.

    Raises SchedulerError for a num_train_timesteps out of range.
    """
    trained = int(options["num_train_timesteps"])
    if not 1 <= trained <= MAX_TRAIN_TIMESTEPS:
        raise SchedulerError(
            f"num_train_timesteps is {trained}: 1 to {MAX_TRAIN_TIMESTEPS} are supported; mend the scheduler config"
        )
    return max(trained, MOST_CONTINUOUS_STEPS) if chosen.continuous else trained


def checked_steps(steps: int, options: Mapping[str, Any]) -> int:
    """Return the number of steps; raises RequestError unless it is a whole number from 1 to the largest there is."""
    limit = options["most_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= limit:
        raise RequestError(f"num_inference_steps {steps!r} is out of range: give a whole number from 1 to {limit}")
    return int(steps)


def first_step(name: str, steps: int, strength: float) -> int:
    """Return the step at which image-to-image starts with a scheduler class (diffusers rounds differently for flows).

    Raises RequestError for a strength outside (0, 1], or one that leaves no step to run.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength {strength} is out of range: give a number above 0 and up to 1")
    start = int(steps - steps * strength) if name.startswith("Flow") else steps - int(steps * strength)
    if start >= steps:
        raise RequestError(
            f"strength {strength} of {steps} steps leaves no step to run: give at least {1 / steps:.3f}, or more steps"
        )
    return start
