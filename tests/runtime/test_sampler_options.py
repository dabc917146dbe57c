"""Options of a scheduler config: prediction types, zero terminal SNR, spacing details, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import LatentRTError, RequestError, SchedulerError
from latentrt.runtime.sampling import names, step_table
from latentrt.runtime.sampling.catalog import SAMPLERS

DIFFUSION = [name for name in SAMPLERS if "beta_schedule" in SAMPLERS[name].defaults and name != "UnCLIPScheduler"]
PLAIN = {"clip_sample": False, "skip_prk_steps": True}
SPACINGS = ("leading", "trailing", "linspace")
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}

# as shipped with Stable Diffusion 1.5, 2.1 and XL
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}
SDXL = SD15 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
DPM = SD15 | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_type": "heun",
    "solver_order": 3,
    "use_karras_sigmas": True,
}


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("cls", DIFFUSION)
def test_prediction_types(cls: str, prediction: str, schedulers: Any) -> None:
    config = schedulers.config(cls, PLAIN | {"prediction_type": prediction})
    if prediction == "sample" and cls in {
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
    }:
        with pytest.raises((ValueError, NotImplementedError)):
            schedulers.run(config, 5)
        with pytest.raises(LatentRTError, match="prediction_type='sample'"):
            step_table(config, 5)
        return
    if cls == "DDIMInverseScheduler" and prediction == "sample":
        config["set_alpha_to_one"] = False  # a clean picture has no noise to tell
    for steps in (5, 20):
        schedulers.assert_same(config, steps)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
        ("DDPMScheduler", {"clip_sample": True, "timestep_spacing": "trailing"}),
        ("LCMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_zero_terminal_snr(cls: str, options: dict[str, Any], steps: int, schedulers: Any) -> None:
    config = schedulers.config(cls, options | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    # rescaling subtracts nearly equal float32 numbers, and square roots differ in the last bit between libraries
    schedulers.assert_same(config, steps, tolerance=2e-5)


def test_zero_terminal_snr_refuses_to_divide_by_no_signal(schedulers: Any) -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    config = schedulers.config("DDIMScheduler", options)
    assert not np.isfinite(schedulers.run(config, 5)).all()
    with pytest.raises(LatentRTError, match="divide by zero"):
        step_table(config, 5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("options", [{"clip_sample": False}, {"clip_sample": True}])
def test_ddim_eta(options: dict[str, Any], eta: float, schedulers: Any) -> None:
    for steps in (5, 20):
        schedulers.assert_same(schedulers.config("DDIMScheduler", options), steps, eta=eta)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 80.0}),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        ),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, "lower_order_final": False, **TO_MINIMUM}),
        ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True, **TO_MINIMUM}),
        ("UniPCMultistepScheduler", {"disable_corrector": [0, 1, 7]}),
        ("UniPCMultistepScheduler", {"lower_order_final": False, **TO_MINIMUM}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, **TO_MINIMUM}),
        ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 0.1}),
        ("DEISMultistepScheduler", {"lower_order_final": False, "solver_order": 3}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
        ("PNDMScheduler", {"beta_schedule": "linear", "skip_prk_steps": True}),
        ("DDIMScheduler", {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]}),
        ("DDIMScheduler", {"num_train_timesteps": 100}),
        ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 5.0, "clip_sample": True}),
    ],
)
def test_further_options(cls: str, options: dict[str, Any], schedulers: Any) -> None:
    for steps in (5, 20):
        schedulers.assert_same(schedulers.config(cls, options), steps)


def test_shift_for_the_image_size(schedulers: Any) -> None:
    config = schedulers.config("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
    schedulers.assert_same(config, 20, mu=0.8)
    schedulers.assert_same(config | {"time_shift_type": "linear"}, 20, mu=0.8)
    with pytest.raises(LatentRTError, match="mu"):
        step_table(config, 20)


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_respaced_sigmas_do_not_look_at_the_spacing(cls: str, schedulers: Any) -> None:
    for choice in ("karras", "exponential", "beta"):
        config = schedulers.config(cls, {f"use_{choice}_sigmas": True})
        tables = [step_table(config | {"timestep_spacing": spacing}, 20) for spacing in SPACINGS]
        assert all(np.array_equal(tables[0].weights, table.weights) for table in tables[1:])
        assert all(np.array_equal(tables[0].timesteps, table.timesteps) for table in tables[1:])


def test_trailing_spacing_yields_as_many_steps_as_asked_for(schedulers: Any) -> None:
    config = schedulers.config("DDIMScheduler", {"timestep_spacing": "trailing"})
    scheduler = schedulers.new(config)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1 and len(scheduler.timesteps) == 62  # diffusers: one too many, below the first
    table = step_table(config, 61)
    assert len(table) == 61 and table.timesteps.min() >= 0


@pytest.mark.parametrize("config", [SD15, SD21, SDXL, DPM], ids=["SD1.5", "SD2.1", "SDXL", "DPM"])
@pytest.mark.parametrize("cls", DIFFUSION)
def test_a_class_name_switches_as_from_config_does(config: dict[str, Any], cls: str, schedulers: Any) -> None:
    if cls == "SASolverScheduler" and config is DPM:
        with pytest.raises(NotImplementedError):  # the solvers' algorithms are not its own
            schedulers.scheduler_class(cls).from_config(config)
        with pytest.raises(SchedulerError, match="use 'data_prediction', 'noise_prediction'"):
            step_table(config, 20, sampler=cls)
        return
    switched = schedulers.scheduler_class(cls).from_config(config)
    reference = schedulers.run(config, 20, scheduler=switched)
    error = np.abs(schedulers.run_table(config, 20, sampler=cls) - reference).max()
    assert error <= 1e-5 * np.abs(reference).max()


def test_switching_drops_what_the_config_never_set(schedulers: Any) -> None:
    euler = schedulers.scheduler_class("EulerDiscreteScheduler").from_config(SD15)
    config = dict(euler.config)
    assert "timestep_spacing" in config["_use_default_values"]
    switched = schedulers.scheduler_class("DDIMScheduler").from_config(config)
    assert np.array_equal(step_table(config, 10, sampler="DDIMScheduler").timesteps, _timesteps(switched, 10))


def _timesteps(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.numpy()


def test_short_names_stand_for_classes_with_options() -> None:
    def same(name: str, cls: str, **options: Any) -> bool:
        config = SD15 | {"timestep_spacing": "leading"}
        one, other = step_table(config, 10, sampler=name), step_table(config | options, 10, sampler=cls)
        return np.array_equal(one.weights, other.weights) and np.array_equal(one.timesteps, other.timesteps)

    assert same("euler", "EulerDiscreteScheduler")
    assert same("euler_karras", "EulerDiscreteScheduler", use_karras_sigmas=True)
    assert same("dpmpp_2m_beta", "DPMSolverMultistepScheduler", use_beta_sigmas=True)
    assert same("dpmpp_3m_sde", "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3)
    assert same("dpmpp_2s_exponential", "DPMSolverSinglestepScheduler", use_exponential_sigmas=True)
    assert same("plms", "PNDMScheduler", skip_prk_steps=True)
    assert all(len(step_table(SD15, 10, sampler=name)) >= 10 for name in names())


def test_a_suffix_replaces_the_configs_own_sigmas() -> None:
    one = step_table(SD15 | {"use_karras_sigmas": True}, 10, sampler="euler_beta")
    assert np.array_equal(one.timesteps, step_table(SD15, 10, sampler="euler_beta").timesteps)


def test_short_names_leave_latents_unclipped_where_the_config_is_silent() -> None:
    assert not step_table(SD15, 5, sampler="ddim").clip_limits.any()
    assert step_table(SD15, 5, sampler="DDIMScheduler").clip_limits.all()  # as from_config does
    assert step_table(SD15 | {"clip_sample": True}, 5, sampler="ddim").clip_limits.all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SD15 | {"_class_name": "DDIMReverseScheduler"}, "is not known: near are DDIMInverseScheduler, "),
        (
            SD15 | {"_class_name": "DPMSolverSDEScheduler"},
            "a Brownian tree, drawn by torchsde; the nearest sampler is dpm",
        ),
        (SD15 | {"_class_name": "VQDiffusionScheduler"}, "it steps through tokens, not latents"),
        (
            SD15 | {"_class_name": "DDIMScheduler", "thresholding": True, "dynamic_thresholding_ratio": -0.5},
            "dynamic_thresholding_ratio=-0.5 is not supported: give a number above 0, 1 at most",
        ),
        (SD15 | {"_class_name": "DDIMScheduler", "thresholding": True, "sample_max_value": 0}, "sample_max_value=0"),
        (
            SD15 | {"_class_name": "DDIMScheduler", "thresholding": True, "sample_max_value": "1"},
            "='1' is not supported: give a num",
        ),
        (SD15 | {"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned'"),
        (SD15 | {"prediction_type": "sample"}, "prediction_type='sample' is not supported: use 'epsilon', 'v_pred"),
        (SD15 | {"beta_schedule": "square"}, "beta_schedule 'square' is not known"),
        (SD15 | {"timestep_spacing": "odd"}, "timestep_spacing 'odd' is not known"),
        (SD15 | {"beta_start": "small"}, "beta_start='small' is not supported: give a value like 0.0001"),
        (SDXL | {"use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta sigmas at once"),
        (DPM | {"use_flow_sigmas": True}, "karras spacing and use_flow_sigmas exclude each other"),
        (DPM | {"solver_order": 4}, "solver_order=4"),
        (DPM | {"algorithm_type": "dpmsolver"}, "set final_sigmas_type='sigma_min'"),
        (DPM | {"prediction_type": "flow_prediction"}, "set use_flow_sigmas"),
        (DPM | {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        (DPM | {"use_lu_lambdas": True}, "karras and lu sigmas at once"),
        (DPM | {"variance_type": "learnt"}, "variance_type='learnt'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True} | FLOW, "pass mu, the shift"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1.0]}, "scale_factors=[0.5, 1.0]"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.1] * 5}, "trained_betas=[0.1, 0.1"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": -1.0}, "sigmas from 80.0 to -1.0"),
        ({}, "names no class (_class_name)"),
    ],
)
def test_what_a_table_cannot_do_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SchedulerError) as caught:
        step_table(config, 10)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpmp_2m_karas", "near are dpmpp_2m_karras, "),
        ("DDIM", "near are ddim"),
        ("EulerScheduler", "EulerDiscreteScheduler, "),
        ("ddim_karras", "ddim has no sigmas to space"),
        ("euler_lu", "euler takes _karras, _exponential, _beta"),
        ("x" * 5000, "see latentrt samplers"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_where_to_see_all(name: str, message: str) -> None:
    with pytest.raises(SchedulerError) as caught:
        step_table(SD15, 5, sampler=name)
    assert message in str(caught.value) and len(str(caught.value)) < 200


def test_a_long_value_is_not_printed() -> None:
    with pytest.raises(SchedulerError) as caught:
        step_table(DPM | {"solver_type": np.ones(1000)}, 5)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"num_inference_steps": True}, "whole number"),
        ({"num_inference_steps": 1000}, "steps_offset=1"),
        ({"num_inference_steps": 10, "strength": 0.0}, "strength 0.0 is out of range"),
        ({"num_inference_steps": 10, "strength": 1.5}, "strength 1.5 is out of range"),
        ({"num_inference_steps": 10, "strength": 0.05}, "give at least 0.100, or more steps"),
        ({"num_inference_steps": 10, "strength": float("nan")}, "strength nan is out of range"),
        ({"num_inference_steps": 10, "eta": -1.0}, "eta -1.0 is out of range"),
        ({"num_inference_steps": 51, "sampler": "lcm"}, "take 1 to 50"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        step_table(SD15, **arguments)


@pytest.mark.parametrize("name", names())
def test_every_step_count_from_one_on(name: str) -> None:
    config = SD15 | {"timestep_spacing": "leading" if name == "ddim_inverse" else "linspace"}
    for steps in (1, 2, 3, 4, 7, 50):
        table = step_table(config, steps, sampler=name)
        assert steps <= len(table) <= 2 * steps
        assert np.array_equal(table.original[-1], [1, 0])
        assert table.weights.shape == (len(table), 1 + table.history, 4 + table.history)


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_solvers_take_a_config_with_the_variance_of_ddpm(variance: str, cls: str, schedulers: Any) -> None:
    config = SD15 | {"_class_name": "DDPMScheduler", "variance_type": variance, "clip_sample": False}
    switched = schedulers.scheduler_class(cls).from_config(config)
    for steps in (1, 4, 20, 50):
        reference = schedulers.run(config | {"_class_name": cls}, steps, scheduler=switched)
        ours = schedulers.run_table(config, steps, sampler=cls)
        assert np.abs(ours - reference).max() <= 5e-6 * np.abs(reference).max()


def test_ddpm_takes_the_unset_variance_type_of_a_dpm_solver_config_as_fixed_small() -> None:
    solver = SD15 | {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None, "clip_sample": False}
    switched = step_table(solver, 5, sampler="DDPMScheduler")
    plain = step_table(solver | {"variance_type": "fixed_small"}, 5, sampler="DDPMScheduler")
    assert np.array_equal(switched.weights, plain.weights)
    assert not np.array_equal(
        switched.weights, step_table(solver | {"variance_type": "fixed_large"}, 5, sampler="DDPMScheduler").weights
    )
