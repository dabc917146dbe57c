"""Every sampler's table against diffusers' scheduler, on a synthetic denoiser.

The scheduler runs in float64 (its schedule stays as it rounds it), so that what is compared is the algebra; plain
float32 runs follow. Cases that diffusers itself gets wrong are named in BROKEN and must stay broken there.
"""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatch
from itertools import product
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import LatentRTError

STEPS = (2, 5, 20, 50)
SPACINGS = {name: {"timestep_spacing": name} for name in ("leading", "trailing", "linspace")}
RESPACED = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
FLOW = {"flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}}
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}

DISCRETE = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DDIM-clip": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.5}),
    "DDPM-small": ("DDPMScheduler", {"clip_sample": False}),
    "DDPM-small-log": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}),
    "DDPM-large-clip": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM-prk": ("PNDMScheduler", {"skip_prk_steps": False, "set_alpha_to_one": True}),
    "LCM": ("LCMScheduler", {}),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}),
}
SIGMAS = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Heun-clip": ("HeunDiscreteScheduler", {"clip_sample": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2Ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
MULTISTEP = {
    f"DPM-{algorithm}-{order}-{kind}": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
        | ({} if algorithm.endswith("++") else TO_MINIMUM),
    )
    for algorithm, order, kind in product(
        ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), (1, 2, 3), ("midpoint", "heun")
    )
}
SINGLESTEP = {
    name.replace("DPM-", "DPMS-"): ("DPMSolverSinglestepScheduler", options)
    for name, (_, options) in MULTISTEP.items()
    if "-sde-dpmsolver-" not in name
}
UNIPC = {
    f"UniPC-{order}-{kind}{'' if predict_x0 else '-epsilon'}": (
        "UniPCMultistepScheduler",
        {"solver_order": order, "solver_type": kind, "predict_x0": predict_x0} | ({} if predict_x0 else TO_MINIMUM),
    )
    for order, kind, predict_x0 in product((1, 2, 3), ("bh1", "bh2"), (True, False))
}
DEIS = {f"DEIS-{order}": ("DEISMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)}
SOLVERS = MULTISTEP | UNIPC | DEIS
FLOW_EULER = {
    "FlowEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowEuler-shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
    "FlowEuler-stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
}
ALL = DISCRETE | SIGMAS | SOLVERS | SINGLESTEP | FLOW_EULER


def crossed(samplers: dict[str, Any], schedules: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        f"{name}/{schedule}": (cls, options | extra)
        for (name, (cls, options)), (schedule, extra) in product(samplers.items(), schedules.items())
    }


def takes_flow(samplers: dict[str, Any]) -> dict[str, Any]:
    return {name: case for name, case in samplers.items() if "dpmsolver-" not in name and "epsilon" not in name}


CASES = (
    crossed(DISCRETE, SPACINGS)
    | crossed(SIGMAS, {f"{a}-{b}": SPACINGS[a] | RESPACED[b] for a, b in product(SPACINGS, RESPACED)} | SPACINGS)
    | crossed(SOLVERS, SPACINGS | RESPACED)  # respaced sigmas do not look at the spacing: asserted below
    | crossed(SINGLESTEP, {"linspace": {}} | RESPACED)
    | crossed(takes_flow(SOLVERS | SINGLESTEP), FLOW)
    | crossed(FLOW_EULER, {"even": {}} | RESPACED)
)

FIRST = {cls: name for name, (cls, _) in reversed(ALL.items())} | {"UniPCMultistepScheduler": "UniPC-3-bh2"}
"""A case of each class."""

# what diffusers 0.42 cannot do, by sampler/schedule/steps: these stay broken there, and are asserted to
BROKEN = {
    "PNDM-prk/*/2": "four Runge-Kutta steps do not fit into two",
    "UniPC-?-bh1/*": "B(h) = h is infinite at a final sigma of zero: NaN",
    "DPM-sde-dpmsolver-3-*/5": "has no third-order update",
    "DPM-sde-dpmsolver-3-*/20": "has no third-order update",
    "DPM-sde-dpmsolver-3-*/50": "has no third-order update",
    "DPM-*dpmsolver-2-heun/[kbe]*/[25]0": "sigma_min follows itself, and the last step divides by its length: NaN",
    "DPM-dpmsolver-3-*/[kbe]*/[25]0": "sigma_min follows itself, and the last step divides by its length: NaN",
}
# the schedule itself is coarse in float32: sigma_down cancels between sigmas of 14.6 and 0.03
ROUGH = {"KDPM2Ancestral/linspace*/2": 3e-5}


def steps_of(name: str) -> tuple[int, ...]:
    """Return the step counts to try: all for one case of each class and spacing, fewer where only options differ.

    Two are tried where sigmas are spaced anew. What diffusers breaks at a number of steps is tried at that number.
    """
    sampler, schedule = name.split("/")
    if any(each in schedule for each in RESPACED):
        return (2, 20)
    named = any(fnmatch(f"{name}/50", pattern) for pattern in BROKEN)
    return STEPS if named or sampler in FIRST.values() else STEPS[:-1]


def broken(name: str) -> str | None:
    return next((reason for pattern, reason in BROKEN.items() if fnmatch(name, pattern)), None)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_diffusers(name: str, schedulers: Any) -> None:
    config = schedulers.config(*CASES[name])
    for steps in steps_of(name):
        case = f"{name}/{steps}"
        if broken(case) is None:
            schedulers.assert_same(config, steps, next((t for p, t in ROUGH.items() if fnmatch(case, p)), 5e-6))
            continue
        with suppress(ValueError, UnboundLocalError):
            assert not np.isfinite(schedulers.run(config, steps)).all(), case


def test_every_broken_case_is_named_and_does_not_crash_here(schedulers: Any) -> None:
    names = [f"{name}/{steps}" for name in CASES for steps in steps_of(name)]
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in BROKEN)
    for name in filter(broken, names):
        sampler, schedule, steps = name.split("/")
        try:
            latents = schedulers.run_table(schedulers.config(*CASES[f"{sampler}/{schedule}"]), int(steps))
        except LatentRTError:
            continue
        assert np.isfinite(latents).all(), name


# where diffusers' own float32 arithmetic is coarser than 1e-5
ROUNDED = {
    "DEISMultistepScheduler": 5e-4,  # third-order coefficients cancel
    "HeunDiscreteScheduler": 3e-5,  # (x - x0) / sigma at a sigma of 0.03, times a step of 14.6
    "KDPM2AncestralDiscreteScheduler": 3e-5,
}


@pytest.mark.parametrize("cls", FIRST)
def test_agrees_with_diffusers_in_float32(cls: str, schedulers: Any) -> None:
    for steps in STEPS:
        config = schedulers.config(*ALL[FIRST[cls]])
        schedulers.assert_same(config, steps, ROUNDED.get(cls, 1e-5), single=True)


@pytest.mark.parametrize(
    "strength", [pytest.param(0.06, marks=pytest.mark.long), 0.5, pytest.param(0.8, marks=pytest.mark.long), 0.97]
)
@pytest.mark.parametrize("name", ALL)
def test_image_to_image_starts_as_diffusers_does(name: str, strength: float, schedulers: Any) -> None:
    if not broken(f"{name}/linspace/20"):
        schedulers.assert_same(schedulers.config(*ALL[name]), 20, strength=strength)
        schedulers.assert_same(schedulers.config(*ALL[name]), 33, strength=strength)


@pytest.mark.parametrize("name", ALL)
def test_inpainting_blends_as_diffusers_does(name: str, schedulers: Any) -> None:
    if not broken(f"{name}/linspace/20"):
        schedulers.assert_same(schedulers.config(*ALL[name]), 20, inpaint=True)
        schedulers.assert_same(schedulers.config(*ALL[name]), 20, inpaint=True, strength=0.7)
