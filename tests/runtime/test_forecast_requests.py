"""Requests with forecasts, against diffusers' pipeline with a U-Net that forecasts step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import RequestError
from latentrt.runtime import Batcher, Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS = 20
REQUEST: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": STEPS, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


def test_a_request_draws_what_a_network_that_forecasts_draws(pipe: Pipeline, tiny_sd15_checkpoint: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd15_checkpoint)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    forward, known, asked = theirs.unet.forward, list[tuple[int, Any]](), 0

    def forecasting(*inputs: Any, **named: Any) -> Any:
        nonlocal asked
        step, asked = asked, asked + 1
        if step < 6 or step >= STEPS - 2 or (step - 8) % 3 == 0:
            output = forward(*inputs, **named)[0]
            known.append((step, output))
        else:
            (before, older), (latest, newer) = known[-2:]
            output = newer + (newer - older) * ((step - latest) / (latest - before))
        return (output,)

    theirs.unet.forward = forecasting
    expected = theirs(**REQUEST, generator=torch.Generator().manual_seed(3), output_type="np").images
    seen: list[int] = []
    ours = pipe(
        **REQUEST,
        seed=3,
        sampler="DPMSolverMultistepScheduler",
        forecast="taylor",
        output_type="np",
        callback_on_step_end=lambda pipe, step, timestep, values: seen.append(step),
    )
    assert np.abs(ours.images - expected).max() * 255 <= 2
    assert len(seen) == ours.timings.steps == len(known) < asked == STEPS
    exact = pipe(**REQUEST, seed=3, sampler="DPMSolverMultistepScheduler", output_type="np").images
    assert np.abs(exact - expected).max() * 255 > 2  # what is left out is seen


def test_a_forecast_is_an_option_of_a_request(pipe: Pipeline) -> None:
    for mode in ("taylor:interval=2", "spectrum"):
        request = pipe(**REQUEST, seed=3, sampler="ddim", forecast=mode).request
        assert request is not None and request.forecast == mode
    with pytest.raises(RequestError, match=r"^forecast is 'guess': choose taylor or spectrum"):
        pipe(**REQUEST, forecast="guess")
    with pytest.raises(RequestError, match="this sampler draws noise at its steps"):
        pipe(**REQUEST, sampler="euler_a", forecast="taylor")


def test_a_forecast_of_a_short_run_says_that_it_changes_nothing(pipe: Pipeline) -> None:
    short: dict[str, Any] = {**REQUEST, "num_inference_steps": 4, "seed": 3, "sampler": "ddim", "output_type": "latent"}
    exact, same = pipe(**short), pipe(**short, forecast="taylor")
    np.testing.assert_array_equal(same.images, exact.images)
    assert [text for text in same.warnings if "forecast taylor leaves nothing out of 4 evaluations" in text]
    assert not exact.warnings and not pipe(**{**short, "num_inference_steps": 20}, forecast="taylor").warnings


def test_the_older_callback_counts_evaluations(pipe: Pipeline) -> None:
    seen: list[int] = []
    pipe(**REQUEST, seed=3, sampler="heun", forecast="taylor", callback=lambda step, *_: seen.append(step))
    assert seen == list(range(len(seen))) and 10 < len(seen) < 2 * STEPS - 1


def test_a_batcher_says_the_same_of_a_forecast_that_changes_nothing(pipe: Pipeline) -> None:
    short: dict[str, Any] = {**REQUEST, "num_inference_steps": 4, "seed": 3, "sampler": "ddim", "forecast": "taylor"}
    with Batcher(pipe, slots=1) as batcher:
        assert batcher.submit(**short).result(120).warnings == pipe(**short).warnings != []
