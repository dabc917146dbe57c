"""The samplers there are: what each runs on, its options, and the names it goes by.

Keys are the class names found in `scheduler_config.json`; options and defaults are those of the diffusers class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import discrete, dpm_solver, k_diffusion
from .deis import deis
from .pndm import pndm
from .schedules import Options, Schedule, discrete_schedule, flow_schedule, k_schedule, solver_schedule
from .step_table import StepTable
from .unipc import unipc

__all__ = ["SAMPLERS", "SHORT_NAMES", "SUFFIXES", "TRANSLATIONS", "Sampler"]


@dataclass(frozen=True)
class Sampler:
    """A sampler, the schedule it runs on, its options with their defaults, and the values that they may take.

    `fixed` holds what the schedule needs to know and no config changes.
    """

    build: Callable[[Schedule, Options], StepTable]
    schedule: Callable[[Options, int], Schedule]
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    takes_eta: bool = False
    """Whether a request's eta means anything to it."""


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
        DISCRETE | CLIPPING | ZERO_SNR | {"set_alpha_to_one": True},
        {"prediction_type": ANY_BUT_FLOW},
        takes_eta=True,
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
        | {"time_shift_type": "exponential", "stochastic_sampling": False},
        {"invert_sigmas": (False,), "time_shift_type": ("exponential", "linear")},
    ),
}

DPMPP = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# class, options that the name sets, options that it sets where the config is silent
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
TO_MIDPOINT = dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")
FROM_DEIS = {"algorithm_type": {"deis": "dpmsolver++"}, "solver_type": TO_MIDPOINT}
TRANSLATIONS: Mapping[str, Mapping[str, Mapping[Any, str]]] = {
    # DPM-Solver configs write the unset type down; DDPM then leaves its variance as it is, which is `fixed_small`.
    "DDPMScheduler": {"variance_type": {None: "fixed_small"}},
    "DPMSolverMultistepScheduler": FROM_DEIS,
    "DPMSolverSinglestepScheduler": FROM_DEIS,
    "UniPCMultistepScheduler": {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
}
