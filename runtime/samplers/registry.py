"""Every sampler under the class name found in `scheduler_config.json` and under the field's short names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ...engines.errors import RequestError, SchedulerError
from ..schedules import Options, Schedule, discrete_schedule, flow_schedule, k_schedule, solver_schedule
from ..step_table import StepTable
from . import discrete, dpm_solver, k_diffusion
from .deis import deis
from .pndm import pndm
from .unipc import unipc

__all__ = ["names", "step_table"]


@dataclass(frozen=True)
class Sampler:
    """A sampler, the schedule it runs on, its options with their defaults, the values they may take, and what no config changes."""

    build: Callable[[Schedule, Options], StepTable]
    schedule: Callable[[Options, int], Schedule]
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
DISCRETE = TRAINING | {"timestep_spacing": "leading"}
CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
ZERO_SNR = {"rescale_betas_zero_snr": False}
RESPACED = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
SIGMAS = TRAINING | RESPACED | {"timestep_spacing": "linspace"}
OLD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
SOLVER = SIGMAS | {
    "solver_order": 2,
    "lower_order_final": True,
    "thresholding": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
}
DPM = SOLVER | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}

NOISE_OR_V = ("epsilon", "v_prediction")
ANY_BUT_FLOW = ("epsilon", "v_prediction", "sample")
ANY = ("epsilon", "v_prediction", "sample", "flow_prediction")
ORDERS = {
    "solver_order": (1, 2, 3),
    "variance_type": (None,),
    "solver_type": ("midpoint", "heun"),
    "prediction_type": ANY,
}

SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(
        discrete.ddim,
        discrete_schedule,
        DISCRETE | CLIPPING | ZERO_SNR | {"set_alpha_to_one": True, "eta": 0.0},
        {"prediction_type": ANY_BUT_FLOW},
    ),
    "DDPMScheduler": Sampler(
        discrete.ddpm,
        discrete_schedule,
        DISCRETE | CLIPPING | ZERO_SNR | {"variance_type": "fixed_small"},
        {"prediction_type": ANY_BUT_FLOW, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    ),
    "PNDMScheduler": Sampler(
        pndm,
        discrete_schedule,
        DISCRETE | {"skip_prk_steps": False, "set_alpha_to_one": False},
        {"prediction_type": NOISE_OR_V},
    ),
    "LCMScheduler": Sampler(
        discrete.lcm,
        discrete_schedule,
        DISCRETE
        | CLIPPING
        | ZERO_SNR
        | OLD_BETAS
        | {
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
        {"prediction_type": ANY_BUT_FLOW},
    ),
    "EulerDiscreteScheduler": Sampler(
        k_diffusion.euler,
        k_schedule,
        SIGMAS | ZERO_SNR | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
        {"prediction_type": ANY_BUT_FLOW, "interpolation_type": ("linear", "log_linear")},
    ),
    "EulerAncestralDiscreteScheduler": Sampler(
        k_diffusion.euler_ancestral,
        k_schedule,
        TRAINING | ZERO_SNR | {"timestep_spacing": "linspace"},
        {"prediction_type": NOISE_OR_V},
    ),
    "HeunDiscreteScheduler": Sampler(
        k_diffusion.heun,
        k_schedule,
        SIGMAS | OLD_BETAS | {"clip_sample": False, "clip_sample_range": 1.0},
        {"prediction_type": ANY_BUT_FLOW},
    ),
    "LMSDiscreteScheduler": Sampler(k_diffusion.lms, k_schedule, SIGMAS, {"prediction_type": ANY_BUT_FLOW}),
    "KDPM2DiscreteScheduler": Sampler(
        k_diffusion.kdpm2, partial(k_schedule, round_karras=True), SIGMAS | OLD_BETAS, {"prediction_type": NOISE_OR_V}
    ),
    "KDPM2AncestralDiscreteScheduler": Sampler(
        k_diffusion.kdpm2_ancestral,
        partial(k_schedule, round_karras=True),
        SIGMAS | OLD_BETAS,
        {"prediction_type": NOISE_OR_V},
    ),
    "DPMSolverMultistepScheduler": Sampler(
        dpm_solver.dpm_multistep,
        partial(solver_schedule, round_karras=False, repeat_last=False),
        DPM | ZERO_SNR | {"euler_at_final": False, "use_lu_lambdas": False},
        ORDERS
        | {
            "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
            "use_lu_lambdas": (False,),
        },
    ),
    "DPMSolverSinglestepScheduler": Sampler(
        dpm_solver.dpm_singlestep,
        partial(solver_schedule, repeat_last=False),
        DPM | {"lower_order_final": False},
        ORDERS | {"algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")},
        {"timestep_spacing": "linspace"},
    ),
    "UniPCMultistepScheduler": Sampler(
        unipc,
        partial(solver_schedule, flow_from_one=True),
        SOLVER
        | ZERO_SNR
        | {
            "predict_x0": True,
            "solver_type": "bh2",
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "shift_terminal": None,
        },
        {"solver_order": (1, 2, 3), "solver_type": ("bh1", "bh2"), "solver_p": (None,), "prediction_type": ANY},
    ),
    "DEISMultistepScheduler": Sampler(
        deis,
        solver_schedule,
        SOLVER,
        {"solver_order": (1, 2, 3), "prediction_type": ANY},
        {"final_sigmas_type": "sigma_min"},
    ),
    "FlowMatchEulerDiscreteScheduler": Sampler(
        k_diffusion.flow_euler,
        flow_schedule,
        RESPACED
        | {
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "shift_terminal": None,
        }
        | {"time_shift_type": "exponential", "stochastic_sampling": False, "mu": None},
        {"invert_sigmas": (False,), "time_shift_type": ("exponential", "linear")},
    ),
}

# name: class, options it sets, options it sets where the config is silent
DPMPP = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SHORT_NAMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}, {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {}, {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {}, {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}, {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", DPMPP | {"solver_order": 2}, {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", DPMPP | {"solver_order": 3}, {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 2}, {}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 3}, {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", DPMPP | {"solver_order": 2}, {}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", DPMPP | {"solver_order": 3}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}, {}),
}
SUFFIXES = ("karras", "exponential", "beta")
# values that another class's config may carry, and what they become
TRANSLATIONS: dict[str, dict[str, dict[str, str]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    },
    "UniPCMultistepScheduler": {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
}


def names() -> list[str]:
    """Return the short names of the samplers; those on sigmas also take a suffix _karras, _exponential or _beta."""
    return list(SHORT_NAMES)


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

    `sampler` replaces the config's own: a diffusers class name behaves as `Class.from_config(scheduler_config)`; a short name (`names()`)
    does the same, sets the options in its name, and leaves latents unclipped where the config is silent on clip_sample (diffusers'
    DDIM and DDPM would clip). `strength` < 1 (image-to-image) leaves out the first steps, as diffusers does: int(steps * strength) remain, and
    multistep samplers warm up again. `eta` (DDIM) adds noise; `mu` shifts a flow schedule that asks for use_dynamic_shifting.

    Raises RequestError for numbers out of range, SchedulerError for a scheduler or option that no table expresses.
    """
    name, options = resolved(scheduler_config, sampler)
    chosen = SAMPLERS[name]
    steps = checked_steps(num_inference_steps, options)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta {eta} is out of range: give 0 (deterministic) to 1")
    options |= {"eta": eta} if "eta" in options else {"mu": mu} if "mu" in options else {}
    with np.errstate(all="ignore"):  # TableBuilder.table refuses what is not finite
        schedule = chosen.schedule(options, steps)
        return chosen.build(
            replace(schedule, start=first_step(steps, strength, flow=name.startswith("FlowMatch"))), options
        )


def resolved(config: Mapping[str, Any], sampler: str | None) -> tuple[str, dict[str, Any]]:
    """Return the class name and the complete options of a sampler for a scheduler config; raises SchedulerError for what it cannot do."""
    own = str(config.get("_class_name", ""))
    forced: dict[str, Any] = {}
    silent: dict[str, Any] = {}
    name = sampler or own
    if name not in SAMPLERS:
        name, forced, silent = from_short_name(name)
    chosen = SAMPLERS[name]
    unset = config.get("_use_default_values", ())
    given = {
        key: value for key, value in config.items() if key in chosen.defaults and not (name != own and key in unset)
    }
    options = {**chosen.defaults, **silent, **given, **forced, **chosen.fixed}
    for key, table in TRANSLATIONS.get(name, {}).items():
        options[key] = table.get(options[key], options[key])
    check(name, options, chosen)
    return name, options


def from_short_name(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return class name, forced options and fallback options of a short name; raises SchedulerError for an unknown one."""
    base, _, suffix = name.rpartition("_")
    if suffix in SUFFIXES and base in SHORT_NAMES and "use_karras_sigmas" in SAMPLERS[SHORT_NAMES[base][0]].defaults:
        sigmas = {f"use_{each}_sigmas": each == suffix for each in SUFFIXES}
        class_name, forced, silent = SHORT_NAMES[base]
        return class_name, forced | sigmas, silent
    if name not in SHORT_NAMES:
        raise SchedulerError(
            f"sampler {name!r} is not known: use one of {', '.join(SHORT_NAMES)} (or with _karras, _exponential, _beta), or a class name "
            f"of {', '.join(SAMPLERS)}"
        )
    return SHORT_NAMES[name]


def check(name: str, options: Mapping[str, Any], chosen: Sampler) -> None:
    """Raise SchedulerError for option values that this sampler's table does not express."""
    for key, allowed in chosen.choices.items():
        if options[key] not in allowed:
            listed = ", ".join(repr(value) for value in allowed)
            raise SchedulerError(
                f"{name} with {key}={options[key]!r} is not supported: use {listed}, or choose another sampler"
            )
    if options.get("thresholding"):
        raise SchedulerError(
            f"{name} with thresholding=True is not supported (it is not linear): set it to false or choose another sampler"
        )
    if options.get("use_dynamic_shifting") and "mu" not in options:
        raise SchedulerError(
            f"{name} with use_dynamic_shifting=True is not supported: set flow_shift, or use flow_euler"
        )
    if options.get("prediction_type") == "flow_prediction" and not options["use_flow_sigmas"]:
        raise SchedulerError(f"{name} with prediction_type='flow_prediction' needs use_flow_sigmas=True")
    if options.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") and options["final_sigmas_type"] == "zero":
        raise SchedulerError(
            f"{name} with algorithm_type={options['algorithm_type']!r} cannot end at a sigma of zero: set final_sigmas_type='sigma_min'"
        )
    if options.get("final_sigmas_type", "zero") not in ("zero", "sigma_min"):
        raise SchedulerError(
            f"{name} with final_sigmas_type={options['final_sigmas_type']!r} is not known: use 'zero' or 'sigma_min'"
        )


def checked_steps(steps: int, options: Mapping[str, Any]) -> int:
    """Return the number of steps; raises RequestError unless it is a whole number in 1 .. num_train_timesteps."""
    limit = int(options["num_train_timesteps"])
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= limit:
        raise RequestError(f"num_inference_steps {steps!r} is out of range: give a whole number from 1 to {limit}")
    return int(steps)


def first_step(steps: int, strength: float, *, flow: bool) -> int:
    """Return the step at which image-to-image starts; diffusers rounds differently for flow models. Raises RequestError when none remain."""
    if not 0 < strength <= 1:
        raise RequestError(f"strength {strength} is out of range: give a number above 0 and up to 1")
    start = int(steps - steps * strength) if flow else steps - int(steps * strength)
    if start >= steps:
        raise RequestError(
            f"strength {strength} of {steps} steps leaves no step to run: raise strength to at least {1 / steps:.3f}, or steps"
        )
    return start
