"""Samplers that a pipeline drives in its own way, and what pipelines may give to any: against diffusers."""

from __future__ import annotations

import inspect
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import LatentRTError, RequestError
from latentrt.runtime.sampling import Churn, step_table
from latentrt.runtime.sampling.catalog import SAMPLERS

STEPS = (1, 4, 20, 50)
V = {"prediction_type": "v_prediction"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}
KARRAS = {"use_karras_sigmas": True}
ZERO_SNR = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "TCD": ("TCDScheduler", {}),
    "TCD-v": ("TCDScheduler", V),
    "TCD-sample": ("TCDScheduler", {"prediction_type": "sample"}),
    "EDMEuler": ("EDMEulerScheduler", {}),
    "EDMEuler-exponential": ("EDMEulerScheduler", V | TO_MINIMUM | {"sigma_schedule": "exponential"}),
    "EDMDPM": ("EDMDPMSolverMultistepScheduler", {}),
    "EDMDPM-3": ("EDMDPMSolverMultistepScheduler", V | {"sigma_schedule": "exponential", "solver_order": 3}),
    "EDMDPM-sde": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "Wuerstchen": ("DDPMWuerstchenScheduler", {}),
    "Wuerstchen-up": ("DDPMWuerstchenScheduler", {"scaler": 2.0}),
    "Wuerstchen-down": ("DDPMWuerstchenScheduler", {"scaler": 0.5}),
    "UnCLIP": ("UnCLIPScheduler", COSINE),
    "UnCLIP-prior": ("UnCLIPScheduler", COSINE | {"prediction_type": "sample", "clip_sample_range": 5.0}),
    "FlowHeun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "FlowLCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "FlowLCM-karras": ("FlowMatchLCMScheduler", KARRAS),
    "SCM": ("SCMScheduler", {}),
    "CogVideoXDDIM": ("CogVideoXDDIMScheduler", {}),
    "CogVideoXDDIM-zero": ("CogVideoXDDIMScheduler", ZERO_SNR),
    "CogVideoXDDIM-linear": ("CogVideoXDDIMScheduler", {"beta_schedule": "linear", "snr_shift_scale": 1.5}),
    "CogVideoXDPM": ("CogVideoXDPMScheduler", {}),
    "CogVideoXDPM-zero": ("CogVideoXDPMScheduler", ZERO_SNR),
    "DDIMParallel": ("DDIMParallelScheduler", {"clip_sample": False}),
    "DDPMParallel": ("DDPMParallelScheduler", {}),
    "original-sample": ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}),
    "UniPC-karras-flow": ("UniPCMultistepScheduler", FLOW | KARRAS),
    "UniPC-karras-flow-minimum": (
        "UniPCMultistepScheduler",
        FLOW | KARRAS | TO_MINIMUM | {"sigma_max": 80.0, "sigma_min": 0.02},
    ),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "shift": 3.0}),
    "SA": ("SASolverScheduler", {}),
    "SA-noise": ("SASolverScheduler", {"algorithm_type": "noise_prediction"}),
    "SA-3-4": ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}),
    "SA-3-1-karras": (
        "SASolverScheduler",
        KARRAS | {"predictor_order": 3, "corrector_order": 1, "lower_order_final": False},
    ),
    "SA-flow": ("SASolverScheduler", FLOW),
    "lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "lu-cosine": ("DPMSolverMultistepScheduler", COSINE | TO_MINIMUM | {"use_lu_lambdas": True}),
    "IPNDM": ("IPNDMScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {"num_train_timesteps": 60}),
    "consistency-unclipped": (
        "CMStochasticIterativeScheduler",
        {"num_train_timesteps": 151, "clip_denoised": False, "s_noise": 1.01, "sigma_max": 60.0},
    ),
    "flow-map": ("FlowMapEulerDiscreteScheduler", {"shift": 5.0}),
    "few-training-steps": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1, "shift": 3.0}),
    "few-inverted": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1, "invert_sigmas": True}),
    "inverse": ("DDIMInverseScheduler", {"clip_sample": False}),
    "inverse-clip": ("DDIMInverseScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False}),
}
IMPOSSIBLE = {
    "UnCLIP*/1": "diffusers divides by the number of steps less one",
    "IPNDM/1": "the only step ends at zero latents, which has no relative error",
    "lu-cosine/[25]0": "sigma_min follows itself, and the last step divides by its length: NaN",
}
# where diffusers' own float32 arithmetic is coarser than 1e-5
ROUNDED = {
    "UnCLIP*": 3e-4,  # 1 - alpha at the first timestep
    "EDMEuler/1": 5e-5,  # (x - x0) / sigma times sigma, at a sigma of 80
    "SA-3-4/*": 1e-3,  # polynomials around log SNR 0 instead of around the step
}


DIFFUSION = [
    *("DDIM", "DDPM", "LCM", "TCD", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"),
    *("SASolver", "EDMDPMSolverMultistep"),
]
LIMITS: dict[str, dict[str, Any]] = {
    "to 1": {},
    "to a half": {"sample_max_value": 0.5, "dynamic_thresholding_ratio": 0.7},
    "before clip_sample": {"clip_sample": True, "clip_sample_range": 0.3},
    "of noise": {"algorithm_type": "dpmsolver", "predict_x0": False} | TO_MINIMUM,
    "of v": V,
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("cls", DIFFUSION)
def test_thresholding_whose_bound_has_no_room(cls: str, limits: str, schedulers: Any) -> None:
    options = LIMITS[limits]
    if cls in ("DEISMultistep", "SASolver", "EDMDPMSolverMultistep", "DPMSolverSinglestep"):  # the last fails itself
        options = {key: value for key, value in options.items() if key != "algorithm_type"}
    config = schedulers.config(f"{cls}Scheduler", {"thresholding": True} | options)
    for steps in (1, 4, 20):
        schedulers.assert_same(config, steps)
    plain = schedulers.run_table(config | {"thresholding": False, "clip_sample": False}, 4)
    unused = cls == "TCD" or (cls == "UniPCMultistep" and limits == "of noise")
    assert np.array_equal(schedulers.run_table(config, 4), plain) == unused


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_diffusers(name: str, schedulers: Any) -> None:
    config = schedulers.config(*CASES[name])
    for steps in STEPS:
        case = f"{name}/{steps}"
        if any(fnmatch(case, pattern) for pattern in IMPOSSIBLE):
            continue
        schedulers.assert_same(config, steps, 5e-6)
        tolerance = next((value for pattern, value in ROUNDED.items() if fnmatch(case, pattern)), 1e-5)
        schedulers.assert_same(config, steps, tolerance, single=True)


def test_what_has_no_number_of_its_own_ends_well(schedulers: Any) -> None:
    with pytest.raises(RequestError, match="take 2 or more"):
        step_table(schedulers.config(*CASES["UnCLIP"]), 1)
    ours = schedulers.run_table(schedulers.config(*CASES["IPNDM"]), 1)
    assert not ours.any() and not schedulers.run(schedulers.config(*CASES["IPNDM"]), 1).any()


NO_NOISE = ("SCM", "IPNDM", "inverse", "inverted", "few-inverted", "UniPC-karras-flow-minimum")
"""diffusers has no way to noise a picture for these, or not the one that the steps undo."""


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(NO_NOISE)])
def test_image_to_image_and_inpainting(name: str, schedulers: Any) -> None:
    config = schedulers.config(*CASES[name])
    for strength in (0.5, 0.97):
        schedulers.assert_same(config, 16, strength=strength)
    schedulers.assert_same(config, 10, inpaint=True, strength=0.7)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_with_noise(eta: float, schedulers: Any) -> None:
    for steps in STEPS:
        schedulers.assert_same(schedulers.config("TCDScheduler", {}), steps, eta=eta)
    table = step_table(schedulers.config("TCDScheduler", {}), 4, eta=eta)
    assert table.draws.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("churn", [Churn(10.0), Churn(5.0, 0.1, 10.0, 1.01)], ids=["all", "between"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", V),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
        ("EDMEulerScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_churn(cls: str, options: dict[str, Any], churn: Churn, schedulers: Any) -> None:
    for steps in STEPS:
        schedulers.assert_same(schedulers.config(cls, options), steps, churn=churn)


def test_churn_is_refused_where_diffusers_adds_none(schedulers: Any) -> None:
    with pytest.raises(RequestError, match="HeunDiscreteScheduler takes no s_churn: choose EulerDiscreteScheduler"):
        step_table({"_class_name": "HeunDiscreteScheduler"}, 4, churn=Churn(1.0))
    with pytest.raises(RequestError, match="out of range"):
        step_table({"_class_name": "EulerDiscreteScheduler"}, 4, churn=Churn(-1.0))


TOLD = {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}
TIMES = {"timesteps": [1000.0, 700.0, 500.0, 100.0]}
SHARES = {"sigmas": [1.0, 0.9, 0.7, 0.45, 0.2, 0.05]}
SIGMAS = {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]}  # AYS, and the end
DYNAMIC = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cls", "options", "given"),
    [
        ("DDPMScheduler", {"clip_sample": False}, TOLD),
        ("DDPMWuerstchenScheduler", {}, {"timesteps": [1.0, 0.8, 0.3, 0.1, 0.0]}),
        ("DPMSolverMultistepScheduler", {}, TOLD),
        ("DPMSolverSinglestepScheduler", {}, TOLD),
        ("EulerDiscreteScheduler", {}, TOLD),
        ("EulerDiscreteScheduler", {}, SIGMAS),
        ("EulerDiscreteScheduler", KARRAS, SIGMAS),
        ("EulerDiscreteScheduler", V | {"timestep_type": "continuous"}, SIGMAS),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, TIMES),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, SHARES),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0} | KARRAS, SHARES),
        ("FlowMatchEulerDiscreteScheduler", {}, TIMES | {"sigmas": [1.0, 0.6, 0.4, 0.1]}),
        ("FlowMatchLCMScheduler", {"shift": 3.0}, TIMES),
        ("FlowMatchLCMScheduler", {"shift": 3.0}, SHARES),
        ("HeunDiscreteScheduler", {}, TOLD),
        ("LCMScheduler", {}, {"timesteps": [999, 499]}),
        ("TCDScheduler", {}, {"timesteps": [999, 700, 499, 20]}),
        ("CMStochasticIterativeScheduler", {}, {"timesteps": [22, 0]}),
        ("CMStochasticIterativeScheduler", {"num_train_timesteps": 201}, {"timesteps": [106, 17, 0]}),
        ("FlowMapEulerDiscreteScheduler", {"shift": 5.0}, TIMES),
        ("FlowMapEulerDiscreteScheduler", {"shift": 5.0}, SHARES),
        ("UniPCMultistepScheduler", FLOW, SHARES),
        ("UniPCMultistepScheduler", DYNAMIC, SHARES | {"mu": 0.8}),
    ],
)
def test_timesteps_and_sigmas_of_the_request(
    cls: str, options: dict[str, Any], given: dict[str, Any], schedulers: Any
) -> None:
    config = schedulers.config(cls, options)
    schedulers.assert_same(config, None, **given)
    schedulers.assert_same(config, 7, strength=0.6, **given)


@pytest.mark.parametrize(
    "cls",
    [f"{name}Scheduler" for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep")],
)
def test_solvers_shift_for_the_image_size(cls: str, schedulers: Any) -> None:
    for steps in STEPS:
        schedulers.assert_same(schedulers.config(cls, DYNAMIC), steps, mu=0.8)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_only_what_diffusers_takes_is_taken(cls: str, schedulers: Any) -> None:
    """EDM Euler's `sigmas` are left out: they are places on a ramp there, and a list of them is an error."""
    taken = set(inspect.signature(schedulers.scheduler_class(cls).set_timesteps).parameters) & {"timesteps", "sigmas"}
    expected = taken if cls != "EDMEulerScheduler" else set()
    assert {what for what in ("timesteps", "sigmas") if getattr(SAMPLERS[cls], what) is not None} == expected
    for what in {"timesteps", "sigmas"} - expected:
        with pytest.raises(RequestError, match=f"{cls} takes no {what}"):
            step_table({"_class_name": cls}, 4, **{what: [3.0, 2.0, 1.0]})


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, {"timesteps": [499, 999]}, "timesteps must decrease and stay at 0 or above: here 499, 999 follow"),
        ({}, {"timesteps": [999, 999]}, "here 999, 999 follow each other"),
        ({}, {"timesteps": [999, -1]}, "here 999, -1 follow each other"),
        ({}, {"timesteps": [999, float("nan")]}, "must decrease"),
        ({}, {"timesteps": []}, "timesteps has 0 numbers: give 1 or more"),
        ({}, {"timesteps": "abc"}, "timesteps are no list of numbers"),
        ({}, {"timesteps": 5}, "timesteps are no list of numbers"),
        ({}, {"sigmas": [1.0]}, "sigmas has 1 numbers: give 2 or more"),
        ({}, {"timesteps": [9.0], "sigmas": [1.0, 0.0]}, "timesteps and sigmas are given: give one of them"),
        ({"use_karras_sigmas": True}, {"timesteps": [999, 0]}, "timesteps cannot be given with karras sigmas"),
        ({"_class_name": "DDPMScheduler"}, {"timesteps": [1000, 0]}, "begin at 999 or below"),
        ({"_class_name": "DPMSolverMultistepScheduler"} | FLOW, {"timesteps": [999, 0]}, "with flow sigmas"),
        ({"_class_name": "UniPCMultistepScheduler"}, {"sigmas": [1.0, 0.5]}, "with use_flow_sigmas only"),
        ({}, {}, "num_inference_steps is not given"),
    ],
)
def test_timesteps_and_sigmas_that_cannot_be(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(LatentRTError) as caught:
        step_table({"_class_name": "EulerDiscreteScheduler"} | config, None, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
