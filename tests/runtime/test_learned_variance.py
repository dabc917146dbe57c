"""Learned variances and dynamic thresholding: the tables against diffusers, and the step graph against the tables."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from latentrt.engines.errors import SchedulerError
from latentrt.export.step_graph import step_graph
from latentrt.runtime.loop.pack import pack
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.noise import Generator
from latentrt.runtime.sampling.step_table import STEP_INPUTS, StepTable

from .conftest import with_variance
from .test_step_graph import Batch, denoiser, relative_error, session

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


OPTIONS = [set_of for count in (1, 2) for set_of in combinations(STEP_INPUTS, count)]


def with_variances(latents: Any, timestep: Any, branch: Any) -> Any:
    """Return a prediction [.., 2 C, h, w]: what it says of the variance is another for each branch."""
    variance = 1.2 * np.cos(3 * latents + timestep / 300 + branch)
    return np.concatenate([denoiser(latents, timestep, branch), variance], axis=-3)


class GivenBatch(Batch):
    """Images whose noise has the deviation that the prompt's branch gives."""

    def mixed(self, outputs: list[Any], mix: list[float]) -> Any:
        if self.network is denoiser:
            return super().mixed(outputs, mix)
        halves = [np.split(output, 2, axis=-3) for output in outputs]
        return np.concatenate([super().mixed([first for first, _ in halves], mix), halves[-1][1]], axis=-3)


def batch_of(tables: list[StepTable], scales: list[float], branches: int, options: Any) -> GivenBatch:
    kind: Any = type("_", (GivenBatch,), {"options": options})
    kind.network = staticmethod(with_variances if "learned variance" in options else denoiser)
    batch: GivenBatch = kind(tables, scales, branches, mask=True)
    return batch


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=" and ".join)
def test_the_step_graph_in_a_batch_of_every_kind(options: tuple[Any, ...], branches: int) -> None:
    config = {"_class_name": "DDPMScheduler", "clip_sample_range": 0.8}
    learned = config | LEARNED if "learned variance" in options else config
    dynamic = DYNAMIC if "dynamic thresholding" in options else {}
    tables = [
        step_table(learned | dynamic, 8),
        step_table(learned, 11),
        step_table(config | dynamic, 5, sampler="dpmpp_3m"),
        step_table(config, 9, sampler="DDIMScheduler", eta=0.7),
        step_table(config, 4, sampler="euler_a"),
        step_table(config | dynamic | {"dynamic_thresholding_ratio": 1.0}, 6, sampler="unipc"),
    ]
    assert {option for table in tables for option in table.options} == set(options)
    batch = batch_of(tables, [1.0, 7.5, 3.0, 12.0, 2.5, 0.0], branches, options)
    step = session("fp32", options)
    assert relative_error(batch.run_graph(step, 11), batch.run_numpy()) < 5e-5
    assert np.array_equal(batch.run_graph(step, 14), batch.run_graph(step, 11))
    half = session("fp16", options)
    assert relative_error(batch.run_graph(half, 11, np.float16), batch.run_numpy()) < 0.1


@pytest.mark.parametrize("largest", [1.5, 4.0, 100.0])
@pytest.mark.parametrize("cells", [(1, 1), (3, 2), (64, 64), (256, 256)])
def test_the_bound_is_torchs_quantile(cells: tuple[int, int], largest: float) -> None:
    """One row that turns x0 into the next latents, over values of many sizes, equal ones among them."""
    torch = pytest.importorskip("torch")
    shape = (3, *cells)
    step = onnxruntime.InferenceSession(step_graph("fp32", 3, ["dynamic thresholding"]).SerializeToString())
    config = DYNAMIC | {"_class_name": "DDPMScheduler", "prediction_type": "sample", "sample_max_value": largest}
    for seed, scale in enumerate((0.3, 1.0, 2.0, 40.0)):
        values = Generator(seed).randn(shape) * np.float32(scale)
        values.reshape(-1)[: values.size // 3] = values.reshape(-1)[0]
        for ratio in (0.1, 0.5, 0.95, 0.995, 1.0):
            table = step_table(config | {"dynamic_thresholding_ratio": ratio}, 1)
            table.weights[0, 0] = [0, 0, 0, 1]  # the clipped column alone
            packed = pack([table], [[1.0]], table.options)
            blank = np.zeros((1, 2, *shape), np.float32)
            given = {"history": blank[:, :1], "noise": blank[:, :1], "original": blank}
            given |= {"latents": blank[:, 0], "prediction": values[None], "mask": np.ones((1, 1, *cells), bool)}
            names = {each.name for each in step.get_inputs()}
            got = step.run(["next_latents"], {name: array for name, array in (packed | given).items() if name in names})
            bound = torch.quantile(torch.from_numpy(values).abs().flatten(), ratio).clamp(1, largest).numpy()
            wanted = np.clip(values, -bound, bound) / bound
            assert np.abs(got[0][0] - wanted).max() <= 2.5e-7, (seed, ratio)


def test_what_a_graph_lacks_is_no_input_of_it() -> None:
    for options in [(), *OPTIONS]:
        names = {each.name for each in step_graph("fp32", 4, options).graph.input}
        for option, inputs in STEP_INPUTS.items():
            assert (set(inputs) <= names) == (option in options) and (not set(inputs) & names) == (
                option not in options
            )
