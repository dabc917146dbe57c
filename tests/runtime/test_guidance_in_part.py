"""Requests that are guided in part, against diffusers' pipeline with a U-Net that counts its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import MissingPlanError, RequestError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.runtime import Pipeline
from latentrt.runtime.loop.guidance import guided_in_part, with_skipped_layers
from latentrt.runtime.loop.pack import pack
from latentrt.runtime.loop.session import Session
from latentrt.runtime.loop.workspace import Workspace
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.step_table import Guided

from ..engines.simulated_backends import tensorrt_backend
from ..engines.simulated_cuda import SimulatedDriver

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, SCALE = 10, 5.0
REQUEST: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": STEPS, "guidance_scale": SCALE}
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SOLVER = "DPMSolverMultistepScheduler"


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


def theirs(checkpoint: Path, guided: Callable[[int], bool], reuse: int, images: int = 1) -> Any:
    """Return diffusers' picture where some steps see the prompt's prediction twice, or it and what was added before."""
    other = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    other.set_progress_bar_config(disable=True)
    other.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    forward, asked, added = other.unet.forward, 0, None

    def in_part(*inputs: Any, **named: Any) -> Any:
        nonlocal asked, added
        step, asked = asked, asked + 1
        negative, prompt = forward(*inputs, **named)[0].chunk(2)
        if not guided(step):
            return (torch.cat([prompt, prompt]),)
        if step < reuse or added is None:
            added = prompt - negative
        return (torch.cat([prompt - added, prompt]),)

    other.unet.forward = in_part
    generators = [torch.Generator().manual_seed(3 + i) for i in range(images)]
    return other(**REQUEST, num_images_per_prompt=images, generator=generators, output_type="np").images


CASES: list[tuple[dict[str, Any], Callable[[int], bool], int]] = [
    ({"guidance_interval": (0.0, 0.5)}, lambda step: step < 5, STEPS),
    ({"guidance_interval": (0.25, 0.8)}, lambda step: 2 <= step < 8, STEPS),
    ({"guidance_reuse": 0.4}, lambda step: True, 4),
    ({"guidance_interval": (0.2, 0.9), "guidance_reuse": 0.5}, lambda step: 2 <= step < 9, 5),
]


@pytest.mark.parametrize(("options", "guided", "reuse"), CASES)
def test_a_request_draws_what_a_loop_that_guides_in_part_draws(
    pipe: Pipeline,
    tiny_sd15_checkpoint: Path,
    options: dict[str, Any],
    guided: Callable[[int], bool],
    reuse: int,
) -> None:
    expected = theirs(tiny_sd15_checkpoint, guided, reuse)
    ours = pipe(**REQUEST, **options, seed=3, sampler=SOLVER, output_type="np")
    exact = pipe(**REQUEST, seed=3, sampler=SOLVER, output_type="np").images
    assert np.abs(ours.images - expected).max() < 1e-4 < 1e-3 < np.abs(exact - expected).max()


def test_rows_of_the_prompt_alone_are_computed_where_nothing_is_guided(
    tiny_sd15_bundle: Path, branches_asked: list[int]
) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, mode="eager") as pipe:
        pipe(**REQUEST, guidance_interval=(0.25, 0.6), seed=3, sampler=SOLVER, output_type="latent")
    assert branches_asked == [1 + (2 <= step < 6) for step in range(STEPS)]


@pytest.mark.parametrize("mode", ["eager", "loop", "request"])
def test_captured_runs_give_the_bits_of_eager_ones_whatever_ran_before(
    pipe: Pipeline, tiny_sd15_bundle: Path, mode: Any
) -> None:
    settings: list[dict[str, Any]] = [{}, {"guidance_interval": (0.0, 0.5)}, {"guidance_reuse": 0.3}]
    wanted = [pipe(**REQUEST, **each, seed=3, sampler=SOLVER, output_type="latent").images for each in settings]
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, mode=mode) as other:
        for _ in range(3):
            for each, expected in zip(settings, wanted, strict=True):
                found = other(**REQUEST, **each, seed=3, sampler=SOLVER, output_type="latent").images
                np.testing.assert_array_equal(found, expected)


def test_what_failed_before_does_not_reach_a_run_that_starts_without_guidance(pipe: Pipeline) -> None:
    request = {**REQUEST, "guidance_interval": (0.5, 1.0), "seed": 3, "output_type": "latent"}
    wanted = pipe(**request).images
    for workspace in pipe.session._workspaces.values():
        workspace.loop._prediction.array[...] = np.nan
    np.testing.assert_array_equal(pipe(**request).images, wanted)


def test_two_pictures_are_drawn_as_each_alone(pipe: Pipeline, tiny_sd15_checkpoint: Path) -> None:
    options: dict[str, Any] = {"guidance_interval": (0.0, 0.5), "sampler": SOLVER, "output_type": "np"}
    expected = theirs(tiny_sd15_checkpoint, lambda step: step < 5, STEPS, images=2)
    both = pipe(**REQUEST, **options, num_images_per_prompt=2, seed=3).images
    assert np.abs(both - expected).max() < 1e-4


def test_a_part_that_is_the_whole_changes_nothing(pipe: Pipeline) -> None:
    exact = pipe(**REQUEST, seed=3, output_type="latent").images
    same = pipe(**REQUEST, seed=3, output_type="latent", guidance_interval=(0.0, 1.0), guidance_reuse=1.0)
    np.testing.assert_array_equal(same.images, exact)
    alone = pipe(**{**REQUEST, "guidance_scale": 1.0}, seed=3, guidance_interval=(0.0, 0.5))
    assert [text for text in alone.warnings if "without guidance: it changes nothing" in text]


def test_a_part_that_holds_no_step_is_told(pipe: Pipeline) -> None:
    request: dict[str, Any] = {**REQUEST, "seed": 3, "sampler": SOLVER, "output_type": "latent"}
    found = pipe(**request, guidance_interval=(0.5, 0.55))
    plain = pipe(**{**request, "guidance_scale": 1.0})
    np.testing.assert_allclose(found.images, plain.images, atol=1e-4)
    told = "guidance_interval 0.5 to 0.55 holds none of 10 evaluations: nothing is guided, and a negative prompt"
    assert [text.startswith(told) for text in found.warnings] == [True] and not plain.warnings
    assert not pipe(**request, guidance_interval=(0.5, 0.6)).warnings


def test_a_forecast_and_a_part_go_together(pipe: Pipeline) -> None:
    both = pipe(
        **{**REQUEST, "num_inference_steps": 20}, seed=3, sampler="ddim", forecast="taylor", guidance_interval=(0, 0.5)
    )
    assert both.timings.steps < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval ends before it starts: give two shares"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval.0 is -0.1"),
        ({"guidance_interval": (0.1, 0.2, 0.5)}, r"guidance_interval is \(0.1, 0.2, 0.5\): give at most 2, not 3$"),
        ({"guidance_interval": (0.1,)}, r"guidance_interval is \(0.1,\): give 2, not 1$"),
        ({"guidance_interval": ()}, r"guidance_interval is \(\): give 2, not 0$"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5: give a list$"),
        ({"guidance_reuse": 2}, "guidance_reuse is 2"),
    ],
)
def test_what_is_no_part_is_one_line(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**REQUEST, **options)


def test_guidance_is_not_reused_where_latents_are_clipped() -> None:
    clipping = step_table({**CONFIG, "clip_sample": True}, STEPS, sampler="ddim")
    with pytest.raises(RequestError, match="guidance_reuse is given, and this sampler clips latents"):
        guided_in_part(clipping, (0.0, 1.0, 0.5))
    part = guided_in_part(clipping, (0.0, 0.5, 1.0))
    assert part.guided == (Guided.FULLY,) * 5 + (Guided.NOT,) * 5


def test_fixed_shapes_have_an_engine_for_the_rows_of_prompts(
    tiny_sd15_bundle: Path, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)  # has tests of its own
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path), SimulatedDriver())
    request: dict[str, Any] = {**REQUEST, "guidance_interval": (0.0, 0.5), "seed": 3, "output_type": "latent"}
    request |= {"height": 40, "width": 40}  # 400 bytes a row, at which TensorRT takes no address
    with Pipeline(Bundle.open(tiny_sd15_bundle), backend) as fixed:
        for _ in range(3):
            found = fixed(**request).images
            np.testing.assert_allclose(found, pipe(**request).images, atol=1e-4)
        denoisers = [plan for plan in backend._loaded.values() if plan.plan.facts["graph"] == "denoiser"]
        assert len(denoisers) == 2


@pytest.mark.parametrize(
    "part", [(2.8, 0.01, 0.2), (2.8, 0.0, 1.0), (0.5, 0.25, 0.5), (1.0, 0.2, 0.1), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("calls", [1, 2])
def test_layers_are_skipped_at_the_evaluations_at_which_diffusers_does_so(
    part: tuple[float, float, float], calls: int
) -> None:
    scale, start, stop = part
    for steps in (4, 10, 28, 100):
        table = step_table(CONFIG, calls * steps - calls + 1, sampler="ddim")
        skipped = with_skipped_layers(table, part, calls).skipped or (0.0,) * len(table)
        assert skipped == tuple(
            scale if i > steps * start and i < steps * stop else 0.0 for i in range(len(table))
        )  # its pipeline's own condition


@pytest.mark.parametrize("guided", [(0.0, 1.0, 1.0), (0.0, 0.6, 1.0), (0.0, 0.8, 0.3)])
def test_rows_that_skip_layers_are_packed_as_a_plain_loop_computes_them(guided: tuple[float, float, float]) -> None:
    plain = step_table(CONFIG, STEPS, sampler=SOLVER)
    table = with_skipped_layers(guided_in_part(plain, guided), (2.0, 0.1, 0.5), 1)
    packed, random = pack([table], [(1 - SCALE, SCALE)]), np.random.default_rng(0)
    latents = ours = random.standard_normal((1, 2, 2))
    history = [np.zeros_like(latents)] * plain.history
    mine, added = [np.zeros_like(latents)] * table.history, np.zeros_like(latents)
    for i in range(STEPS):
        without, negative, prompt = predictions = random.standard_normal((3, 1, 2, 2))
        prediction = prompt
        if i < guided[1] * STEPS:
            if i < guided[2] * STEPS:
                added = SCALE * (prompt - negative) - (prompt - negative)
                prediction = prompt + (2.0 * (prompt - without) if 1 < i < 5 else 0.0)
            prediction = prediction + added
        latents, history = plain.apply(i, latents, prediction, history)
        basis = [ours, *predictions, np.zeros_like(ours), np.zeros_like(ours), *mine]
        ours, *mine = np.einsum("lk,kchw->lchw", packed["weights"][i, :, :, 0, 0, 0].astype(float), np.stack(basis))
        np.testing.assert_allclose(ours, latents, atol=1e-4)


def test_the_engine_for_the_rows_of_prompts_is_built_before_a_request_takes_anything(
    tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    cache, workspace = EngineCache(tmp_path), Session.workspace
    bundle, plans = Bundle.open(tiny_sd15_bundle), list[int]()
    request: dict[str, Any] = {**REQUEST, "num_inference_steps": 2, "guidance_interval": (0.0, 0.5), "seed": 3}

    def built(session: Session, *arrays: Any) -> Workspace:
        plans.append(sum(entry["graph"] == "denoiser" for entry in cache.entries()))
        return workspace(session, *arrays)

    monkeypatch.setattr(Session, "workspace", built)
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache, SimulatedDriver())) as fixed:
        fixed(**{**request, "guidance_interval": None})
        with monkeypatch.context() as patch:
            patch.setattr(fixed.backend, "_build", False)
            with pytest.raises(MissingPlanError, match="no tensorrt plan of denoiser fits"):
                fixed(**request)
        fixed.warm_up(pictures=False, num_inference_steps=2, guidance_scale=SCALE, guidance_interval=(0.0, 0.5))
        known = len(list(cache.entries()))
        fixed(**request)
    assert plans == [1, 2, 2, 2] and len(list(cache.entries())) == known
