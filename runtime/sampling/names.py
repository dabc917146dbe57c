"""The short names of samplers: class, options that a name sets, and where the method comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..schedules.spacing import RESPACED_BY

__all__ = ["SHORT_NAMES", "SUFFIXES", "ShortName"]

NOTHING: Mapping[str, Any] = MappingProxyType({})


class ShortName(NamedTuple):
    """What a short name stands for."""

    class_name: str
    """The diffusers class that it behaves like."""
    meaning: str
    """The method and its source, in a few words."""
    order: int | None
    """How fast its error falls, at least: n times the steps, n**order times less; None: not told."""
    sets: Mapping[str, Any] = NOTHING
    """Options that the name sets."""
    sets_if_silent: Mapping[str, Any] = NOTHING
    """Options that it sets where the scheduler config is silent."""


UNCLIPPED = {"clip_sample": False}
DPMPP = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
DATA = {"algorithm_type": "data_prediction"}
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"

SHORT_NAMES: dict[str, ShortName] = {
    "ddim": ShortName("DDIMScheduler", "DDIM (Song et al. 2021); eta adds noise", 1, {}, UNCLIPPED),
    "ddim_inverse": ShortName(
        "DDIMInverseScheduler", "DDIM from a picture to its noise (Mokady et al. 2023)", None, {}, UNCLIPPED
    ),
    "ddpm": ShortName("DDPMScheduler", "ancestral sampling of DDPM (Ho et al. 2020)", 1, {}, UNCLIPPED),
    "pndm": ShortName(
        "PNDMScheduler", "PNDM, with Runge-Kutta at first unless the config skips it (Liu et al. 2022)", 2
    ),
    "plms": ShortName("PNDMScheduler", "PNDM without Runge-Kutta steps (Liu et al. 2022)", 2, {"skip_prk_steps": True}),
    "ipndm": ShortName("IPNDMScheduler", "improved PNDM, for Dance Diffusion's schedule (Zhang and Chen 2023)", None),
    "lcm": ShortName("LCMScheduler", "latent consistency, 1 to 8 steps (Luo et al. 2023)", None),
    "tcd": ShortName(
        "TCDScheduler", "trajectory consistency, 1 to 8 steps (Zheng et al. 2024); eta is its gamma", None
    ),
    "euler": ShortName("EulerDiscreteScheduler", "Euler's method in sigma (Karras et al. 2022)", 1),
    "euler_a": ShortName("EulerAncestralDiscreteScheduler", "Euler's method with fresh noise (k-diffusion)", 1),
    "heun": ShortName(
        "HeunDiscreteScheduler", "Heun's method, two calls a step (Karras et al. 2022)", 2, {}, UNCLIPPED
    ),
    "lms": ShortName("LMSDiscreteScheduler", "linear multistep over four slopes (k-diffusion)", 2),
    "dpm_2": ShortName("KDPM2DiscreteScheduler", "midpoint method, two calls a step (k-diffusion)", 2),
    "dpm_2_a": ShortName("KDPM2AncestralDiscreteScheduler", "midpoint method with fresh noise (k-diffusion)", 2),
    "dpmpp_2m": ShortName(
        MULTISTEP, "DPM-Solver++ multistep, order 2 (Lu et al. 2022)", 2, DPMPP | {"solver_order": 2}
    ),
    "dpmpp_3m": ShortName(
        MULTISTEP, "DPM-Solver++ multistep, order 3 (Lu et al. 2022)", 2, DPMPP | {"solver_order": 3}
    ),
    "dpmpp_2m_sde": ShortName(
        MULTISTEP, "DPM-Solver++ multistep with fresh noise, order 2 (Lu et al. 2022)", 2, SDE | {"solver_order": 2}
    ),
    "dpmpp_3m_sde": ShortName(
        MULTISTEP, "DPM-Solver++ multistep with fresh noise, order 3 as diffusers has it", 1, SDE | {"solver_order": 3}
    ),
    "dpmpp_2s": ShortName(
        SINGLESTEP, "DPM-Solver++ singlestep, order 2 (Lu et al. 2022)", 2, DPMPP | {"solver_order": 2}
    ),
    "dpmpp_3s": ShortName(
        SINGLESTEP, "DPM-Solver++ singlestep, order 3 (Lu et al. 2022)", 3, DPMPP | {"solver_order": 3}
    ),
    "unipc": ShortName("UniPCMultistepScheduler", "UniPC, a predictor and a corrector (Zhao et al. 2023)", 3),
    "deis": ShortName("DEISMultistepScheduler", "DEIS, polynomials in log rho (Zhang and Chen 2023)", 2),
    "sa_solver": ShortName("SASolverScheduler", "SA-Solver, stochastic Adams methods (Xue et al. 2023)", None, DATA),
    "flow_euler": ShortName("FlowMatchEulerDiscreteScheduler", "Euler's method on a flow (Liu et al. 2022)", 1),
    "flow_heun": ShortName(
        "FlowMatchHeunDiscreteScheduler", "Heun's method on a flow, two calls a step (Karras et al. 2022)", 2
    ),
    "flow_lcm": ShortName("FlowMatchLCMScheduler", "consistency on a flow, few steps (Starodubcev et al. 2025)", None),
}
SUFFIXES = RESPACED_BY
"""What may stand behind a name and a _ to space the sigmas in another way, and the option that it sets."""
