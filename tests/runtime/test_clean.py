"""What a prediction says of the picture, against diffusers' own schedulers and plain formulas."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from latentrt.runtime.sampling import clean_factors, step_table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STEPS = 6
KINDS = ("epsilon", "v_prediction", "sample")
SAID = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "LCM", "EDMEuler")
"""Schedulers whose step says what it takes for the picture."""
CONVERTING = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver", "EDMDPMSolverMultistep")
"""Those that convert what the network gave to it."""


def estimates(cls: str, more: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return what each step of a run on random predictions takes for the picture, ours and diffusers' own."""
    config = {} if "sigma_data" in more else CONFIG
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, f"{cls}Scheduler").from_config({**config, **more})
        scheduler.set_timesteps(STEPS)
    config = {**scheduler.config, "_class_name": f"{cls}Scheduler"}
    table = step_table(config, STEPS)
    generator, found = torch.Generator().manual_seed(1), []
    latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for row, t in enumerate(scheduler.timesteps):
        prediction = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
        a, b = clean_factors(config, None, table, row)
        scheduler.scale_model_input(latents, t)
        theirs = None
        if cls in CONVERTING:
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            theirs = scheduler.convert_model_output(prediction, sample=latents)
        taken = scheduler.step(prediction, t, latents, **({"generator": generator} if cls != "UniPCMultistep" else {}))
        if cls not in CONVERTING:
            theirs = taken.denoised if cls == "LCM" else taken.pred_original_sample
        if cls == "LCM":  # out x0 + skip x
            scaled = float(t) * scheduler.config.timestep_scaling
            theirs = (theirs - 0.25 / (scaled**2 + 0.25) * latents) / (scaled / (scaled**2 + 0.25) ** 0.5)
        found.append(((a * latents + b * prediction).numpy(), theirs.numpy()))
        latents = taken.prev_sample
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [*SAID, *CONVERTING])
def test_a_prediction_says_what_diffusers_takes_for_the_picture(cls: str, kind: str) -> None:
    if kind == "sample" and cls in ("EulerAncestralDiscrete", "EDMEuler", "EDMDPMSolverMultistep"):
        return
    more = {"prediction_type": kind} | ({"sigma_data": 0.5} if cls.startswith("EDM") else {})
    found = estimates(cls, more)
    assert len(found) == STEPS
    for ours, theirs in found:
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("cls", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_a_flow_leads_from_noise_to_the_picture(cls: str) -> None:
    config = {"_class_name": f"{cls}Scheduler", "num_train_timesteps": 1000, "shift": 3.0}
    table = step_table(config, STEPS)
    for row, timestep in enumerate(table.timesteps):
        assert clean_factors(config, None, table, row) == pytest.approx((1.0, -timestep / 1000), abs=1e-6)


def test_the_last_row_of_a_consistency_model_gives_the_picture_itself() -> None:
    config = {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": False}
    table = step_table(config, 2)
    latents, prediction, history = np.eye(2)[0], np.eye(2)[1], [np.zeros(2)] * table.history
    last, _ = table.apply(1, latents, prediction, history)
    np.testing.assert_allclose(clean_factors(config, None, table, 1), last, atol=2e-3)
