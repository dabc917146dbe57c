"""Samplers by name: a scheduler config and a number of steps become a step table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...engines.errors import LatentRTError, RequestError, SchedulerError, reason
from .catalog import SAMPLERS, SHORT_NAMES, SUFFIXES, TRANSLATIONS, Sampler
from .step_table import StepTable

__all__ = ["SamplerDescription", "describe", "names", "step_table", "takes_eta"]

MAX_TRAIN_TIMESTEPS = 100_000

TYPES: dict[type, tuple[type, ...]] = {bool: (bool, type(None)), int: (int,), float: (int, float), str: (str,)}


FIRST_ORDER = ("ddim", "ddpm", "euler", "euler_a", "dpmpp_3m_sde", "flow_euler")
THIRD_ORDER = ("dpmpp_3s", "unipc")
NO_ORDER = ("lcm",)
"""It draws noise anew at every step, and converges to nothing."""


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


def names() -> list[str]:
    """Return the short names of the samplers; those with sigmas to space also take _karras, _exponential or _beta."""
    return list(SHORT_NAMES)


def describe() -> list[SamplerDescription]:
    """Return every sampler that has a short name, with what its own documentation says."""
    return [_described(name) for name in SHORT_NAMES]


def _described(name: str) -> SamplerDescription:
    class_name, forced, _ = SHORT_NAMES[name]
    sampler = SAMPLERS[class_name]
    build = sampler.build.func if isinstance(sampler.build, partial) else sampler.build
    order = 1 if name in FIRST_ORDER else 3 if name in THIRD_ORDER else None if name in NO_ORDER else 2
    meaning = (build.__doc__ or "").strip().splitlines()[0].partition("; slot")[0].rstrip(".")
    settings = ", ".join(f"{key}={value}" for key, value in forced.items())
    suffixes = tuple(SUFFIXES) if "use_karras_sigmas" in sampler.defaults else ()
    return SamplerDescription(name, class_name, suffixes, order, meaning + (f"; {settings}" if settings else ""))


def step_table(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
    mu: float | None = None,
) -> StepTable:
    """Build the table of a run from a diffusers `scheduler_config.json` and a number of steps.

    `sampler` replaces the config's own: a diffusers class name behaves as `Class.from_config(scheduler_config)`; a
    short name (`names()`) does the same, sets the options in its name, and leaves latents unclipped where the config
    is silent on clip_sample (diffusers' DDIM and DDPM would clip). `strength` < 1 (image-to-image) leaves out the first
    steps, as diffusers does: int(steps * strength) remain, and multistep samplers warm up again. `eta` (DDIM) adds
    noise; `mu` shifts a flow schedule that asks for use_dynamic_shifting.

    Raises RequestError for numbers out of range, SchedulerError for a scheduler or option that no table expresses.
    """
    try:
        with np.errstate(all="ignore"):  # TableBuilder.table refuses what is not finite
            return _table(scheduler_config, num_inference_steps, sampler, strength, eta, mu)
    except LatentRTError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # a config of wrong types, lengths or signs
        raise SchedulerError(
            f"the scheduler config makes no schedule ({reason(error)}): export the checkpoint again, "
            "or choose another sampler"
        ) from error


def _table(
    config: Mapping[str, Any], steps: int, sampler: str | None, strength: float, eta: float, mu: float | None
) -> StepTable:
    name, options = resolved(config, sampler)
    steps = checked_steps(steps, options)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta {eta} is out of range: give 0 (deterministic) to 1")
    options |= {"eta": eta, "mu": mu}
    schedule = SAMPLERS[name].schedule(options, steps)
    start = first_step(steps, strength, flow=name.startswith("FlowMatch"))
    return SAMPLERS[name].build(replace(schedule, start=start), options)


def takes_eta(sampler: str, scheduler_config: Mapping[str, Any]) -> bool:
    """Tell whether a sampler, by any of its names, has the option eta."""
    return SAMPLERS[resolved(scheduler_config, sampler)[0]].takes_eta


def resolved(config: Mapping[str, Any], sampler: str | None) -> tuple[str, dict[str, Any]]:
    """Return the class name and the complete options of a sampler for a scheduler config, checked."""
    own = str(config.get("_class_name", ""))
    forced: dict[str, Any] = {}
    silent: dict[str, Any] = {}
    name = sampler or own
    if name not in SAMPLERS:
        name, forced, silent = from_short_name(name)
    chosen = SAMPLERS[name]
    unset = config.get("_use_default_values", ()) if name != own else ()
    given = {key: value for key, value in config.items() if key in chosen.defaults and key not in unset}
    options = {**chosen.defaults, **silent, **given, **forced, **chosen.fixed}
    for key, table in TRANSLATIONS.get(name, {}).items():
        options[key] = table.get(options[key], options[key])
    check(name, options, chosen)
    return name, options


def from_short_name(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return class name, forced options and fallback options of a short name; raises SchedulerError if unknown."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    base, _, suffix = name.rpartition("_")
    if suffix in SUFFIXES and base in SHORT_NAMES:
        class_name, forced, silent = SHORT_NAMES[base]
        if "use_karras_sigmas" in SAMPLERS[class_name].defaults:
            return class_name, forced | {f"use_{each}_sigmas": each == suffix for each in SUFFIXES}, silent
    raise SchedulerError(
        f"sampler {name!r} is not known: use one of {', '.join(SHORT_NAMES)} (with _karras, _exponential or _beta "
        f"where it has sigmas to space), or a class name of {', '.join(SAMPLERS)}"
    )


def check(name: str, options: Mapping[str, Any], chosen: Sampler) -> None:
    """Raise SchedulerError for option values that this sampler's table does not express."""

    def refuse(key: str, advice: str) -> SchedulerError:
        given = f"{name} with {key}={options[key]!r}"
        return SchedulerError(f"{given} is not supported: {advice}, or choose another sampler")

    for key, default in chosen.defaults.items():
        if default is not None and not isinstance(options[key], TYPES.get(type(default), object)):
            raise refuse(key, f"give a value like {default!r}")
    for key, allowed in chosen.choices.items():
        if options[key] not in allowed:
            raise refuse(key, f"use {', '.join(repr(value) for value in allowed)}")
    if options.get("thresholding"):
        raise refuse("thresholding", "set it to false")
    if options.get("use_dynamic_shifting") and name != "FlowMatchEulerDiscreteScheduler":
        raise refuse("use_dynamic_shifting", "set flow_shift")
    if options.get("prediction_type") == "flow_prediction" and not options["use_flow_sigmas"]:
        raise refuse("prediction_type", "set use_flow_sigmas")
    if options.get("final_sigmas_type", "zero") not in ("zero", "sigma_min"):
        raise refuse("final_sigmas_type", "use 'zero' or 'sigma_min'")
    if options.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") and options["final_sigmas_type"] == "zero":
        raise refuse("algorithm_type", "set final_sigmas_type='sigma_min'")


def checked_steps(steps: int, options: Mapping[str, Any]) -> int:
    """Return the number of steps; raises RequestError unless it is a whole number in 1 .. num_train_timesteps."""
    limit = int(options["num_train_timesteps"])
    if not 1 <= limit <= MAX_TRAIN_TIMESTEPS:
        raise SchedulerError(
            f"num_train_timesteps is {limit}: 1 to {MAX_TRAIN_TIMESTEPS} are supported; mend the scheduler config"
        )
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= limit:
        raise RequestError(f"num_inference_steps {steps!r} is out of range: give a whole number from 1 to {limit}")
    return int(steps)


def first_step(steps: int, strength: float, *, flow: bool) -> int:
    """Return the step at which image-to-image starts (diffusers rounds differently for flow models).

    Raises RequestError for a strength outside (0, 1], or one that leaves no step to run.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength {strength} is out of range: give a number above 0 and up to 1")
    start = int(steps - steps * strength) if flow else steps - int(steps * strength)
    if start >= steps:
        raise RequestError(
            f"strength {strength} of {steps} steps leaves no step to run: give at least {1 / steps:.3f}, or more steps"
        )
    return start
