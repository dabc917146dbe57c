"""The samplers there are: what each runs on, its options and what a request may give it.

Keys are the class names found in `scheduler_config.json`; options and defaults are those of the diffusers class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..schedules import Options, Schedule
from ..schedules.continuous import consistency_schedule, cosine_schedule, edm_schedule, sine_schedule
from ..schedules.diffusion import (
    discrete_schedule,
    inverse_schedule,
    k_schedule,
    solver_schedule,
    whole_range_schedule,
)
from ..schedules.flow import flow_map_schedule, flow_schedule, trigonometric_schedule
from ..schedules.options import (
    CLIPPING,
    CONSISTENCY,
    DISCRETE,
    DISTILLED,
    DPM,
    EDM,
    FLOW,
    OLD_BETAS,
    SIGMAS,
    SOLVER,
    SPACED,
    THRESHOLDING,
    TRAINING,
    VIDEO,
    ZERO_SNR,
)
from . import discrete, dpm_solver, flow, k_diffusion
from .deis import deis
from .names import SHORT_NAMES, ShortName
from .pndm import ipndm, pndm
from .sa_solver import sa_solver
from .step_table import StepTable
from .unipc import unipc

__all__ = ["SAMPLERS", "SHORT_NAMES", "VARIANCES", "Sampler", "ShortName"]


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
    takes_churn: bool = False
    """Whether noise can be added at its steps."""
    continuous: bool = False
    """Whether there may be more steps than training timesteps: none of them is looked up."""
    timesteps: int | None = None
    """How many more timesteps than steps a request may give: 0, or 1 where the last one ends the run; None: none."""
    sigmas: int | None = None
    """The same for sigmas."""


NOISE_OR_V = {"prediction_type": ("epsilon", "v_prediction")}
ANY_BUT_FLOW = {"prediction_type": ("epsilon", "v_prediction", "sample")}
ANY = {"prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction")}
SHIFTED = {"time_shift_type": ("exponential",)}
ORDERS = {"solver_order": (1, 2, 3), "variance_type": (None,), "solver_type": ("midpoint", "heun")} | ANY | SHIFTED
VARIANCES = {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")}
DATA = {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
SPACING = {"timestep_spacing": "linspace"}
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}
EDM_CHOICES = NOISE_OR_V | {"sigma_schedule": ("karras", "exponential")}
SHIFTS = {"time_shift_type": ("exponential", "linear")}

SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(
        discrete.ddim,
        discrete_schedule,
        DISCRETE | CLIPPING | THRESHOLDING | ZERO_SNR | {"set_alpha_to_one": True},
        ANY_BUT_FLOW,
        takes_eta=True,
    ),
    "DDIMInverseScheduler": Sampler(
        discrete.ddim_inverse,
        inverse_schedule,
        DISCRETE | CLIPPING | ZERO_SNR | {"set_alpha_to_one": True},
        ANY_BUT_FLOW | {"timestep_spacing": ("leading", "trailing")},
    ),
    "CogVideoXDDIMScheduler": Sampler(discrete.ddim, discrete_schedule, VIDEO, ANY_BUT_FLOW),
    "CogVideoXDPMScheduler": Sampler(discrete.sde_dpm_video, discrete_schedule, VIDEO, ANY_BUT_FLOW),
    "DDPMScheduler": Sampler(
        discrete.ddpm,
        discrete_schedule,
        DISCRETE | CLIPPING | THRESHOLDING | ZERO_SNR | {"variance_type": "fixed_small"},
        ANY_BUT_FLOW | VARIANCES,
        timesteps=0,
    ),
    "DDPMWuerstchenScheduler": Sampler(
        discrete.wuerstchen,
        cosine_schedule,
        {"scaler": 1.0, "s": 0.008},
        fixed={"num_train_timesteps": 1000},
        continuous=True,
        timesteps=1,
    ),
    "UnCLIPScheduler": Sampler(
        discrete.ddpm,
        whole_range_schedule,
        CLIPPING
        | {
            "num_train_timesteps": 1000,
            "variance_type": "fixed_small_log",
            "prediction_type": "epsilon",
            "beta_schedule": "squaredcos_cap_v2",
        },
        {
            "prediction_type": ("epsilon", "sample"),
            "variance_type": ("fixed_small_log", "learned_range"),
            "beta_schedule": ("squaredcos_cap_v2",),
        },
        OLD_BETAS | {"trained_betas": None, "trained_beta": True},
    ),
    "PNDMScheduler": Sampler(
        pndm, discrete_schedule, DISCRETE | {"skip_prk_steps": False, "set_alpha_to_one": False}, NOISE_OR_V
    ),
    "IPNDMScheduler": Sampler(
        ipndm,
        sine_schedule,
        {"num_train_timesteps": 1000, "trained_betas": None},
        {"trained_betas": (None,)},
        continuous=True,
    ),
    "LCMScheduler": Sampler(discrete.lcm, discrete_schedule, DISTILLED, ANY_BUT_FLOW, timesteps=0),
    "TCDScheduler": Sampler(
        discrete.tcd,
        discrete_schedule,
        DISTILLED,
        ANY_BUT_FLOW,
        {"thresholding": False},  # as clip_sample, it is an option that diffusers' class does not look at
        takes_eta=True,
        timesteps=0,
    ),
    "CMStochasticIterativeScheduler": Sampler(k_diffusion.consistency, consistency_schedule, CONSISTENCY, timesteps=0),
    "EulerDiscreteScheduler": Sampler(
        k_diffusion.euler,
        k_schedule,
        SIGMAS | ZERO_SNR | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
        ANY_BUT_FLOW | {"interpolation_type": ("linear", "log_linear")},
        takes_churn=True,
        timesteps=0,
        sigmas=1,
    ),
    "EulerAncestralDiscreteScheduler": Sampler(
        k_diffusion.euler_ancestral, k_schedule, TRAINING | ZERO_SNR | SPACING, NOISE_OR_V
    ),
    "HeunDiscreteScheduler": Sampler(
        k_diffusion.heun, k_schedule, SIGMAS | OLD_BETAS | CLIPPING | {"clip_sample": False}, ANY_BUT_FLOW, timesteps=0
    ),
    "LMSDiscreteScheduler": Sampler(k_diffusion.lms, k_schedule, SIGMAS, ANY_BUT_FLOW),
    "KDPM2DiscreteScheduler": Sampler(
        k_diffusion.kdpm2, partial(k_schedule, round_karras=True), SIGMAS | OLD_BETAS, NOISE_OR_V
    ),
    "KDPM2AncestralDiscreteScheduler": Sampler(
        k_diffusion.kdpm2_ancestral, partial(k_schedule, round_karras=True), SIGMAS | OLD_BETAS, NOISE_OR_V
    ),
    "EDMEulerScheduler": Sampler(
        k_diffusion.euler,
        partial(edm_schedule, single=False),
        EDM,
        EDM_CHOICES,
        takes_churn=True,
        continuous=True,
    ),
    "EDMDPMSolverMultistepScheduler": Sampler(
        dpm_solver.dpm_multistep,
        partial(edm_schedule, single=True),
        EDM
        | THRESHOLDING
        | {"solver_order": 2, "lower_order_final": True, "euler_at_final": False}
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
        EDM_CHOICES | DATA | {"solver_order": (1, 2, 3), "solver_type": ("midpoint", "heun")},
        continuous=True,
    ),
    "DPMSolverMultistepScheduler": Sampler(
        dpm_solver.dpm_multistep,
        partial(solver_schedule, round_karras=False, repeat_last=False),
        DPM | ZERO_SNR | {"euler_at_final": False, "use_lu_lambdas": False},
        ORDERS | {"algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")},
        timesteps=0,
    ),
    "DPMSolverSinglestepScheduler": Sampler(
        dpm_solver.dpm_singlestep,
        partial(solver_schedule, repeat_last=False),
        DPM | {"lower_order_final": False},
        ORDERS | {"algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")},
        SPACING,
        timesteps=0,
    ),
    "UniPCMultistepScheduler": Sampler(
        unipc,
        partial(solver_schedule, flow_from_one=True),
        SOLVER
        | ZERO_SNR
        | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}
        | {"final_sigmas_type": "zero", "shift_terminal": None},
        ANY | SHIFTS | {"solver_order": (1, 2, 3), "solver_type": ("bh1", "bh2"), "solver_p": (None,)},
        sigmas=0,
    ),
    "DEISMultistepScheduler": Sampler(
        deis, solver_schedule, SOLVER, ANY | SHIFTED | {"solver_order": (1, 2, 3)}, TO_MINIMUM
    ),
    "SASolverScheduler": Sampler(
        sa_solver,
        solver_schedule,
        TRAINING
        | SPACED
        | SPACING
        | THRESHOLDING
        | {"predictor_order": 2, "corrector_order": 2, "tau_func": None, "algorithm_type": "data_prediction"}
        | {"lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0}
        | {"lambda_min_clipped": -float("inf"), "variance_type": None},
        ANY
        | {"predictor_order": (1, 2, 3, 4), "corrector_order": (1, 2, 3, 4), "tau_func": (None,)}
        | {"algorithm_type": ("data_prediction", "noise_prediction"), "variance_type": (None,)},
        TO_MINIMUM | {"use_dynamic_shifting": False},
    ),
    "FlowMatchEulerDiscreteScheduler": Sampler(
        flow.flow_euler,
        flow_schedule,
        FLOW | {"stochastic_sampling": False},
        SHIFTS,
        continuous=True,
        timesteps=0,
        sigmas=0,
    ),
    "FlowMapEulerDiscreteScheduler": Sampler(
        flow.flow_euler,
        flow_map_schedule,
        {"num_train_timesteps": 1000, "shift": 1.0},
        fixed={"stochastic_sampling": False},
        continuous=True,
        timesteps=0,
        sigmas=0,
    ),
    "FlowMatchHeunDiscreteScheduler": Sampler(
        flow.flow_heun,
        flow_schedule,
        {"num_train_timesteps": 1000, "shift": 1.0},
        takes_churn=True,
        continuous=True,
    ),
    "FlowMatchLCMScheduler": Sampler(
        flow.flow_lcm,
        flow_schedule,
        FLOW | {"scale_factors": None},
        SHIFTS | {"scale_factors": (None, [])},
        continuous=True,
        timesteps=0,
        sigmas=0,
    ),
    "SCMScheduler": Sampler(
        flow.scm,
        trigonometric_schedule,
        {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5},
        {"prediction_type": ("trigflow",)},
        continuous=True,
        timesteps=1,
    ),
}
# the same numbers; they differ in what they do to batches in diffusers
SAMPLERS["DDIMParallelScheduler"] = SAMPLERS["DDIMScheduler"]
SAMPLERS["DDPMParallelScheduler"] = SAMPLERS["DDPMScheduler"]
