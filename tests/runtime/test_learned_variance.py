"""Learned variances and dynamic thresholding: the tables against diffusers, and the step graph against the tables."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from latentrt.engines.errors import SchedulerError
from latentrt.runtime.sampling import step_table

from .conftest import with_variance

LEARNED = {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
THRESHOLDED = (
    *("DDIM", "DDPM", "DDPMParallel", "LCM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("UniPCMultistep", "SASolver", "EDMDPMSolverMultistep"),
)


@pytest.mark.parametrize("steps", [2, 4, 20, 50])
@pytest.mark.parametrize("more", [{}, DYNAMIC, {"clip_sample": True}], ids=["plain", "thresholded", "clipped"])
@pytest.mark.parametrize("cls", ["DDPM", "DDPMParallel", "UnCLIP"])
def test_learned_variance(cls: str, more: dict[str, Any], steps: int, schedulers: Any) -> None:
    config = schedulers.config(f"{cls}Scheduler", LEARNED | more)
    schedulers.assert_same(config, steps, network=with_variance)
    said = schedulers.run_table(config, steps, network=with_variance)
    fixed = schedulers.run_table(
        config | {"variance_type": "fixed_small_log"}, steps, network=lambda x, t: with_variance(x, t)[:, :4]
    )
    assert np.abs(said - fixed).max() > 1e-3


@pytest.mark.parametrize("ratio", [0.3, 0.8, 0.995, 1.0])
@pytest.mark.parametrize("cls", THRESHOLDED)
def test_dynamic_thresholding(cls: str, ratio: float, schedulers: Any) -> None:
    """The bound is 1, a quantile or the largest value, as steps go."""
    options = DYNAMIC | {"dynamic_thresholding_ratio": ratio}
    config = schedulers.config(f"{cls}Scheduler", {"clip_sample": False} | options)
    table = step_table(config, 20)
    assert (table.quantiles == ratio).any() and "dynamic thresholding" in table.options
    for steps in (4, 20):
        schedulers.assert_same(config, steps)
    others = [
        schedulers.run_table(config | change, 20) for change in ({"thresholding": False}, {"sample_max_value": 1})
    ]
    got = schedulers.run_table(config, 20)
    assert all(np.abs(got - other).max() > 1e-4 for other in others[: 1 if ratio == 0.3 else 2])


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_solvers_cut_what_a_network_says_of_variances_off(cls: str, algorithm: str, schedulers: Any) -> None:
    """diffusers cuts after three channels, those of a picture."""
    options = LEARNED | {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    config = schedulers.config(cls, options)
    start = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    with (
        mock.patch(f"{with_variance.__module__}.START", start),
        mock.patch(f"{with_variance.__module__}.SHAPE", start.shape),
    ):
        schedulers.assert_same(config, 7, network=with_variance)


def test_a_prediction_without_variances_is_refused(schedulers: Any) -> None:
    config = schedulers.config("DDPMScheduler", LEARNED)
    with pytest.raises(SchedulerError, match="give a prediction of twice"):
        schedulers.run_table(config, 4)
