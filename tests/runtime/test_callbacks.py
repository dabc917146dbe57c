"""What callbacks of steps see and put in place, whatever computes behind them: padding, captures, the next request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import RequestError
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Bundle, Pipeline

from ..engines.simulated_backends import tensorrt_backend

SMALL: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent", "guidance_scale": 2.0}
SIGMAS = [6.0, 3.0, 1.5, 0.0]
PROMPTS = ["a red circle", "a blue star", "two green rings"]
Values = dict[str, Any]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """A pipeline that computes two images where there is one."""
    with Pipeline(Bundle.open(BUNDLE), tensorrt_backend(monkeypatch, EngineCache(tmp_path)), max_batch=2) as opened:
        yield opened


def test_the_network_sees_replaced_latents_scaled_for_the_next_step(pipe: Pipeline) -> None:
    """A request goes on from them as one does that begins there: Euler's has the sigmas that are left.

    Its first latents are sqrt(sigma^2 + 1) times the noise, and the network sees latents over the same root.
    """
    noise = np.random.default_rng(1).standard_normal((1, 4, 4, 4)).astype(np.float32)
    euler: dict[str, Any] = {**SMALL, "sampler": "euler"}

    def replace(pipe: Pipeline, step: int, timestep: float, values: Values) -> Values | None:
        return {"latents": noise * np.sqrt(SIGMAS[1] ** 2 + 1)} if step == 0 else None

    begun = pipe(PROMPTS[0], latents=noise, sigmas=SIGMAS[1:], **euler).images
    for seed in (1, 2):  # as it is, and from captured steps
        gone_on = pipe(PROMPTS[0], seed=seed, sigmas=SIGMAS, callback_on_step_end=replace, **euler).images
        np.testing.assert_allclose(gone_on, begun, atol=1e-4)


def test_latents_are_replaced_for_every_image_and_branch(pipe: Pipeline, padding: Pipeline) -> None:
    noise = np.random.default_rng(2).standard_normal((3, 4, 4, 4)).astype(np.float32)

    def drawn(given: Pipeline, prompts: list[str], own: Any) -> Any:
        seen: list[int] = []

        def replace(pipe: Pipeline, step: int, timestep: float, values: Values) -> Values | None:
            batch = len(values["latents"])
            seen.append(batch)
            first = sum(seen[:: len(SIGMAS) - 1][:-1])
            return {"latents": own[first : first + batch]} if step == 0 else None

        return given(prompts, seed=1, sampler="euler", sigmas=SIGMAS, callback_on_step_end=replace, **SMALL).images

    alone = [drawn(pipe, [prompt], noise[i : i + 1])[0] for i, prompt in enumerate(PROMPTS)]
    for together in (drawn(pipe, PROMPTS, noise), drawn(padding, PROMPTS, noise)):
        np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_older_callback_sees_what_was_put_in_place(pipe: Pipeline) -> None:
    seen: list[float] = []
    pipe(
        PROMPTS[0],
        seed=1,
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, step, timestep, values: {"latents": np.full_like(values["latents"], step)},
        callback=lambda step, timestep, latents: seen.append(float(latents.mean())),
        **SMALL,
    )
    assert seen == [0.0, 1.0]


def test_nobody_sees_images_that_are_only_computed(padding: Pipeline) -> None:
    seen: list[int] = []
    result = padding(
        PROMPTS,
        seed=1,
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, step, timestep, values: seen.append(len(values["latents"])),
        on_batch=lambda request, first, images: seen.append(10 * len(images)),
        **SMALL,
    )
    assert seen == [2, 2, 20, 1, 1, 10] and len(result.images) == len(result.seeds) == 3


def test_a_request_that_was_stopped_does_not_stop_the_next(pipe: Pipeline) -> None:
    steps: list[int] = []

    def stop(pipe: Pipeline, step: int, timestep: float, values: Values) -> None:
        steps.append(step)
        pipe.stop()

    three: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, **SMALL}
    whole = pipe(PROMPTS[:2], **three).images
    stopped = pipe(PROMPTS[:2], callback_on_step_end=stop, **three)
    assert steps == [0] and stopped.timings.steps == 1 and pipe.interrupt
    again = pipe(PROMPTS[:2], callback_on_step_end=lambda *_: None, **three)
    assert again.timings.steps == 3 and not pipe.interrupt
    np.testing.assert_allclose(again.images, whole, atol=1e-5)


def test_progress_counts_the_steps_that_were_run(pipe: Pipeline) -> None:
    said: list[tuple[str, int, int]] = []
    pipe(PROMPTS[0], seed=1, num_inference_steps=3, progress=lambda *step: said.append(step), **SMALL)
    assert said == [("denoising", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "returned list: return a dict, or nothing"),
        ({"latents": np.zeros((1, 4, 4, 4)), "noise": 1}, "returned 'noise': only latents can be replaced"),
        ({"latents": np.zeros((2, 4, 4, 4))}, r"returned latents \[2, 4, 4, 4\]: return finite latents of shape \[1,"),
        ({"latents": np.full((1, 4, 4, 4), np.inf)}, "return finite latents"),
    ],
    ids=["list", "other", "shape", "infinite"],
)
def test_what_cannot_be_put_in_place_is_an_error_and_the_pipeline_lives_on(
    pipe: Pipeline, returned: Any, message: str
) -> None:
    two: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, **SMALL}
    before = pipe(PROMPTS[0], **two).images
    with pytest.raises(RequestError, match=message):
        pipe(PROMPTS[0], callback_on_step_end=lambda *_: returned, **two)
    assert np.array_equal(pipe(PROMPTS[0], **two).images, before)


@pytest.mark.parametrize("nothing", [None, {}, {"latents": None}], ids=str)
def test_nothing_is_put_in_place_where_nothing_is_given(pipe: Pipeline, nothing: Any) -> None:
    two: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, **SMALL}
    given = pipe(PROMPTS[0], callback_on_step_end=lambda *_: nothing, **two).images
    assert np.array_equal(given, pipe(PROMPTS[0], **two).images)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_latents_of_the_last_step_are_those_that_are_returned_and_decoded(pipe: Pipeline, steps: int) -> None:
    seen: list[Any] = []
    request: dict[str, Any] = {**SMALL, "sampler": "ddim", "seed": 1, "num_inference_steps": steps}
    latents = pipe(PROMPTS[0], callback_on_step_end=lambda *given: seen.append(given[-1]["latents"]), **request).images
    assert len(seen) == steps and np.array_equal(latents, seen[-1])
    picture = pipe(PROMPTS[0], **{**request, "output_type": "pil"}).images[0]
    difference = np.asarray(picture, int) - np.asarray(pipe.decode(latents)[0], int)
    assert np.abs(difference).max() <= 1


def test_a_preview_of_anything_leaves_the_request_as_it_was(pipe: Pipeline) -> None:
    request: dict[str, Any] = {**SMALL, "sampler": "dpmpp_2m", "seed": 1, "num_inference_steps": 3}
    other = np.random.default_rng(3).standard_normal((1, 4, 4, 4)).astype(np.float32)
    shown: list[Any] = []
    drawn = pipe(
        PROMPTS[0], callback_on_step_end=lambda pipe, *_: shown.append(pipe.decode(other)[0]), **request
    ).images
    assert np.array_equal(drawn, pipe(PROMPTS[0], **request).images)
    assert len(shown) == 3 and all(np.array_equal(each, shown[0]) for each in shown)
