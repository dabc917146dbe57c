"""Schedules against closed forms, scipy, and diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.catalog import SAMPLERS
from latentrt.runtime.schedules import training as schedules
from latentrt.runtime.schedules.sigmas import beta_quantiles, respaced_sigmas, timesteps_from_sigmas
from scipy import stats

from . import loops

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"])
@pytest.mark.parametrize("train", [50, 1000])
def test_alphas_equal_diffusers_to_the_last_bit(beta_schedule: str, train: int, schedulers: Any) -> None:
    cls = {"sigmoid": "DDPMScheduler", "exp": "HeunDiscreteScheduler"}.get(beta_schedule, "DDIMScheduler")
    options = BETAS | {"beta_schedule": beta_schedule, "num_train_timesteps": train}
    expected = schedulers.scheduler_class(cls)(**options).alphas_cumprod.numpy()
    assert np.array_equal(schedules.alphas_cumprod(options), expected)


def test_zero_terminal_snr_leaves_no_signal(schedulers: Any) -> None:
    options = BETAS | {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    ours = schedules.alphas_cumprod(options)
    assert ours[-1] == 0
    assert schedules.alphas_cumprod(options, keep_finite=True)[-1] == 2.0**-24
    expected = schedulers.scheduler_class("DDIMScheduler")(**options).alphas_cumprod.numpy()
    assert np.abs(ours[:-1] / expected[:-1] - 1).max() < 1e-5  # square roots differ in the last bit between libraries


def test_linspace_equals_torch() -> None:
    for first, last, count in [(0.029, 0.11, 1000), (1e-4, 0.02, 999), (-6, 6, 1000), (3, 5, 2), (3, 5, 3), (1, 2, 1)]:
        assert np.array_equal(schedules.linspace(first, last, count), torch.linspace(first, last, count).numpy())


def test_beta_quantiles_equal_scipys() -> None:
    probabilities = np.linspace(0, 1, 2001)
    expected = stats.beta.ppf(probabilities, 0.6, 0.6)
    assert np.abs(beta_quantiles(probabilities) - expected).max() < 1e-14
    assert beta_quantiles(probabilities)[[0, -1]].tolist() == [0, 1]


def test_respaced_sigmas_are_even_where_they_should_be() -> None:
    ends = np.array([14.6, 3.0, 0.03])
    karras = respaced_sigmas("karras", {}, ends, 12)
    exponential = respaced_sigmas("exponential", {}, ends, 12)
    beta = respaced_sigmas("beta", {}, ends, 12)
    assert np.allclose(np.diff(karras ** (1 / 7), 2), 0)
    assert np.allclose(np.diff(np.log(exponential), 2), 0)
    assert np.allclose(stats.beta.cdf((beta - 0.03) / 14.57, 0.6, 0.6), np.linspace(1, 0, 12))
    for sigmas in (karras, exponential, beta):
        assert np.allclose(sigmas[[0, -1]], [14.6, 0.03])
    given = respaced_sigmas("karras", {"sigma_min": 0.1, "sigma_max": 80.0}, ends, 12)
    assert np.allclose(given[[0, -1]], [80.0, 0.1])


def test_timesteps_invert_sigmas() -> None:
    sigmas = np.exp(np.linspace(-3, 3, 1000)).astype(np.float32)
    between = np.exp(np.linspace(-3, 3, 1000)[:-1] + 0.003)
    timesteps = timesteps_from_sigmas(between, np.log(sigmas))
    assert np.allclose(np.interp(timesteps, np.arange(1000), np.log(sigmas)), np.log(between), atol=1e-5)
    assert timesteps_from_sigmas(np.array([1e-9, 1e9]), np.log(sigmas)).tolist() == [0, 999]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("cls", SAMPLERS)
def test_timesteps_and_first_noise_equal_diffusers(cls: str, spacing: str, schedulers: Any) -> None:
    if cls == "DDIMInverseScheduler" and spacing == "linspace":
        pytest.skip("neither has it")
    options = {"timestep_spacing": spacing, "skip_prk_steps": True}
    config = schedulers.config(cls, options | ({"beta_schedule": "squaredcos_cap_v2"} if "UnCLIP" in cls else {}))
    for steps in (2 if "UnCLIP" in cls else 1, 3, 10, 30):
        scheduler = schedulers.new(config)
        scheduler.set_timesteps(steps, **loops.schedule(scheduler, steps))
        expected = scheduler.timesteps.numpy()[: -1 if loops.ends(scheduler) else None]
        table = step_table(config, steps)
        assert np.allclose(table.timesteps, expected, rtol=1e-6, atol=2e-2)
        assert table.init_noise_sigma == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-6)


@pytest.mark.parametrize("choice", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("cls", [cls for cls in SAMPLERS if "use_karras_sigmas" in SAMPLERS[cls].defaults])
def test_respaced_timesteps_equal_diffusers(cls: str, choice: str, schedulers: Any) -> None:
    config = schedulers.config(cls, {f"use_{choice}_sigmas": True})
    for steps in (2, 10, 30):
        scheduler = schedulers.new(config)
        scheduler.set_timesteps(steps)
        assert np.allclose(step_table(config, steps).timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=2e-2)
