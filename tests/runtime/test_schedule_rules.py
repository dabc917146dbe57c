"""What pipelines hand to their schedulers, as a rule of the manifest, against the pipelines' own functions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, ScheduleRule, ShiftLine
from latentrt.engines.errors import RequestError, SchedulerError, UnsupportedModelError
from latentrt.export.embedded import bundle_path
from latentrt.runtime import Pipeline
from latentrt.runtime.sampling import check_scheduler, step_table
from latentrt.runtime.schedules.rule import shift_of
from latentrt.runtime.shapes import requested_shapes
from pydantic import ValidationError

STEPS = (1, 4, 20, 50)
SIZES = ((1024, 1024), (512, 768), (1360, 2048))
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DYNAMIC = FLOW | {"use_dynamic_shifting": True}


def between(first: tuple[int, float], last: tuple[int, float]) -> tuple[ShiftLine]:
    """Return the line through two (tokens, shift), as pipelines compute it."""
    slope = (last[1] - first[1]) / (last[0] - first[0])
    return (ShiftLine(slope=slope, offset=first[1] - slope * first[0]),)


FLUX2 = (
    ShiftLine(steps=10, slope=8.73809524e-05, offset=1.89833333),
    ShiftLine(steps=200, slope=0.00016927, offset=0.45666666),
)
# (rule, config, what the pipeline computes: (tokens, steps, config) -> mu)
Mu = Callable[[Any, int, int], float]
PIPELINES: dict[str, tuple[str, ScheduleRule, dict[str, Any], Mu]] = {
    "FLUX.1": (
        "flux.pipeline_flux",
        ScheduleRule(sigmas="even", lines=between((256, 0.5), (4096, 1.15))),
        DYNAMIC,
        lambda module, tokens, steps: module.calculate_shift(tokens, 256, 4096, 0.5, 1.15),
    ),
    "FLUX.2": (
        "flux2.pipeline_flux2",
        ScheduleRule(sigmas="even", lines=FLUX2, last_line_above=4300),
        DYNAMIC,
        lambda module, tokens, steps: module.compute_empirical_mu(tokens, steps),
    ),
    "Qwen-Image": (
        "qwenimage.pipeline_qwenimage",
        ScheduleRule(sigmas="even", lines=between((256, 0.5), (8192, 0.9))),
        DYNAMIC | {"shift_terminal": 0.02},
        lambda module, tokens, steps: module.calculate_shift(tokens, 256, 8192, 0.5, 0.9),
    ),
    "Chroma, Z-Image without shift": (
        "chroma.pipeline_chroma",
        ScheduleRule(sigmas="even", lines=between((256, 0.5), (4096, 1.15))),
        FLOW | {"shift": 3.0},
        lambda module, tokens, steps: module.calculate_shift(tokens, 256, 4096, 0.5, 1.15),
    ),
    "Lumina 2": (
        "lumina2.pipeline_lumina2",
        ScheduleRule(sigmas="even", lines=between((256, 0.5), (4096, 1.15)), tokens=16),
        DYNAMIC,
        lambda module, tokens, steps: module.calculate_shift(16, 256, 4096, 0.5, 1.15),
    ),
    "CogView4": (
        "cogview4.pipeline_cogview4",
        ScheduleRule(sigmas="whole", lines=(ShiftLine(slope=0.75 / 16, offset=0.25),), power=0.5),
        DYNAMIC | {"time_shift_type": "linear"},
        lambda module, tokens, steps: module.calculate_shift(tokens, 256, 0.25, 0.75),
    ),
    "LTX": (
        "ltx.pipeline_ltx",
        ScheduleRule(sigmas="even", lines=between((1024, 0.95), (4096, 2.05)), pixels_per_token=32),
        DYNAMIC | {"shift_terminal": 0.1},
        lambda module, tokens, steps: module.calculate_shift(tokens, 1024, 4096, 0.95, 2.05),
    ),
    "Stable Diffusion 3.5": (
        "stable_diffusion_3.pipeline_stable_diffusion_3",
        ScheduleRule(lines=between((256, 0.5), (4096, 1.15))),
        DYNAMIC,
        lambda module, tokens, steps: module.calculate_shift(tokens, 256, 4096, 0.5, 1.15),
    ),
}


def handed_over(rule: ScheduleRule, steps: int, mu: float) -> dict[str, Any]:
    """Return the arguments of `set_timesteps` as the pipeline writes them."""
    if rule.sigmas == "even":
        return {"mu": mu, "sigmas": np.linspace(1.0, 1 / steps, steps)}
    if rule.sigmas == "whole":
        timesteps = np.linspace(1000, 1.0, steps).astype(np.int64).astype(np.float32)
        return {"mu": mu, "timesteps": timesteps, "sigmas": timesteps / 1000}
    return {"mu": mu}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_rule_is_what_the_pipeline_does(name: str, schedulers: Any) -> None:
    where, rule, config, mu_of = PIPELINES[name]
    module = import_module(f"diffusers.pipelines.{where}")
    side = rule.pixels_per_token
    for size in SIZES:
        for steps in STEPS:
            if steps == 1 and config.get("shift_terminal"):
                with pytest.raises(RequestError, match="take more steps"):
                    step_table(config, steps, rule=rule, size=size)
                continue
            mu = mu_of(module, (size[0] // side) * (size[1] // side), steps)
            assert shift_of(rule, steps, size) == pytest.approx(mu, rel=1e-12)
            reference = schedulers.run(config, steps, **handed_over(rule, steps, mu))
            ours = schedulers.run_table(config, steps, rule=rule, size=size)
            assert np.abs(ours - reference).max() <= 5e-6 * np.abs(reference).max(), (size, steps)


def test_what_the_request_gives_goes_before_the_rule(schedulers: Any) -> None:
    rule, sigmas = PIPELINES["FLUX.1"][1], [1.0, 0.7, 0.2]
    mu = shift_of(rule, 3, (512, 512))
    reference = schedulers.run(DYNAMIC, 3, sigmas=sigmas, mu=mu)
    for steps in (None, 3):
        ours = schedulers.run_table(DYNAMIC, steps, sigmas=sigmas, rule=rule, size=(512, 512))
        assert np.abs(ours - reference).max() <= 5e-6 * np.abs(reference).max()
    other = schedulers.run_table(DYNAMIC, 3, sigmas=sigmas, rule=rule, size=(512, 512), mu=2.0)
    assert np.abs(other - schedulers.run(DYNAMIC, 3, sigmas=sigmas, mu=2.0)).max() <= 1e-5


def test_other_samplers_keep_their_own_sigmas_and_take_the_shift(schedulers: Any) -> None:
    """FluxPipeline hands no sigmas to a scheduler with use_flow_sigmas."""
    rule, size = PIPELINES["FLUX.1"][1], (512, 512)
    config = DYNAMIC | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for cls in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        switched = schedulers.scheduler_class(cls).from_config(config)
        reference = schedulers.run(config | {"_class_name": cls}, 8, scheduler=switched, mu=shift_of(rule, 8, size))
        ours = schedulers.run_table(config, 8, sampler=cls, rule=rule, size=size)
        assert np.abs(ours - reference).max() <= 5e-6 * np.abs(reference).max()


def test_a_size_is_needed_where_the_shift_depends_on_it() -> None:
    with pytest.raises(RequestError, match="give width and height"):
        step_table(DYNAMIC, 4, rule=PIPELINES["FLUX.1"][1])
    assert len(step_table(FLOW, 4, rule=ScheduleRule(sigmas="even"))) == 4


def test_two_lines_for_one_number_of_steps_are_no_rule() -> None:
    line = ShiftLine(slope=0.0, offset=1.15)
    assert shift_of(ScheduleRule(lines=(line,)), 4, (64, 64)) == 1.15
    with pytest.raises(ValidationError, match="one number of steps"):
        ScheduleRule(lines=(line, line))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "use 'learned_range', or ddim"),
        (
            {"_class_name": "DDPMScheduler", "thresholding": True, "dynamic_thresholding_ratio": 95},
            "dynamic_thresholding_ratio=95 is not supported: give a number above 0, 1 at most",
        ),
        ({"_class_name": "DPMSolverSDEScheduler"}, "the nearest sampler is dpmpp_2m_sde"),
        ({}, "names no class"),
        (DYNAMIC, "pass mu"),
    ],
)
def test_a_scheduler_without_a_table_is_refused_with_the_way_out(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_scheduler(config, None, (512, 512))
    text = str(caught.value)
    assert message in text and "change scheduler/scheduler_config.json" in text and len(text) < 400
    assert isinstance(caught.value.__cause__, SchedulerError)


def test_a_number_of_steps_that_does_not_suit_is_no_fault_of_the_scheduler() -> None:
    check_scheduler({"_class_name": "LCMScheduler", "original_inference_steps": 4}, None, (512, 512))
    check_scheduler(DYNAMIC, PIPELINES["FLUX.2"][1], (512, 512))


def test_a_bundle_with_a_rule_draws_at_its_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(bundle_path(), tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    rule = PIPELINES["FLUX.1"][1]
    manifest |= {"scheduler": DYNAMIC, "schedule": rule.model_dump(mode="json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Pipeline.open(folder, "onnxruntime-cpu") as pipe:
        assert pipe.bundle.manifest.schedule == rule
        small, large = (
            pipe("a star", seed=1, num_inference_steps=2, height=side, width=side, output_type="latent").images
            for side in (64, 128)
        )
        assert np.isfinite(small).all() and np.isfinite(large).all()
        tables = [step_table(DYNAMIC, 2, rule=rule, size=(side, side)) for side in (64, 128)]
        assert tables[0].timesteps[1] < tables[1].timesteps[1]
    assert requested_shapes(Bundle.open(folder), 64, 64, 1)["decoder"]
