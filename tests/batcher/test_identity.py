"""A picture does not depend on who else is drawn: the same bits alone and in a crowd, and the pipeline's picture."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any

import numpy as np
import pytest
from latentrt.engines.device import Array, Tensor
from latentrt.engines.engine import BoundEngine
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.batcher.times import StepTimes
from latentrt.runtime.sampling.noise import Generator
from PIL import Image

from .conftest import Gate
from .requests import SMALL, alone, mixed


def in_a_crowd(batcher: Batcher, requests: Sequence[dict[str, Any]], poison: str, seed: int) -> list[Array]:
    """Draw all at once, among others that are cancelled on the way and some that turn to no numbers."""
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    futures, others, poisoned = {}, [], []
    for place, number in enumerate(order):
        futures[batcher.submit(**requests[number])] = number
        if place % 3 == 0:
            others.append(batcher.submit(**{**requests[number], "num_inference_steps": 40, "seed": place}))
        if place % 5 == 1:
            poisoned.append(batcher.submit(**{**requests[number], "prompt": poison}))
    found: dict[int, Array] = {}
    for future in as_completed(futures, timeout=300):
        found[futures[future]] = future.result().images
        if others:
            assert others.pop(0).cancel()
    for other in others:
        other.cancel()
    for future in poisoned:
        with pytest.raises(EngineError, match="denoiser gave latents that are not finite"):
            future.result(300)
    return [found[number] for number in range(len(requests))]


def check(pipe: Pipeline, requests: Sequence[dict[str, Any]], poison: str, slots: int) -> None:
    with Batcher(pipe, slots=slots, fixed_rows=True, max_waiting=1000) as batcher:
        first = alone(batcher, requests)
        for seed in (1, 2):
            for one, other in zip(first, in_a_crowd(batcher, requests, poison, seed), strict=True):
                np.testing.assert_array_equal(one, other)
    for request, picture in zip(requests, first, strict=True):
        assert np.abs(picture - pipe(**request).images).max() <= 1 / 255


def test_a_picture_is_the_same_alone_and_in_a_crowd(pipe: Pipeline, poison: str) -> None:
    check(pipe, mixed(8, most_steps=5, seed=3), poison, slots=3)


@pytest.mark.slow
def test_many_pictures_are_the_same_alone_and_in_a_crowd(pipe: Pipeline, poison: str) -> None:
    check(pipe, mixed(40, most_steps=30, seed=4), poison, slots=4)


@pytest.fixture(scope="module")
def batcher(pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe, slots=3) as opened:
        yield opened


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps as wide as can be, without regard to their times; return the bucket of each."""
    run, step = list[int](), Slots.step
    monkeypatch.setattr(StepTimes, "most", lambda times, wanted: times.buckets[-1])
    monkeypatch.setattr(Slots, "step", lambda slots, bucket: (run.append(bucket), step(slots, bucket))[1])
    return run


def test_buckets_that_change_give_the_pipeline_s_pictures(pipe: Pipeline, batcher: Batcher, buckets: list[int]) -> None:
    requests = mixed(8, most_steps=5, seed=5)
    for request, future in zip(requests, [batcher.submit(**each) for each in requests], strict=True):
        assert np.abs(future.result(300).images - pipe(**request).images).max() <= 1 / 255
    assert len(set(buckets)) > 1 and max(buckets) > 3


def test_idle_slots_read_rows_that_every_bucket_has(
    pipe: Pipeline, batcher: Batcher, buckets: list[int], gate: Gate
) -> None:
    requests = [{**SMALL, "prompt": "a star", "seed": 1, "num_inference_steps": steps} for steps in (2, 2, 5)]
    futures = [batcher.submit(**request) for request in requests]
    gate.open()
    for request, future in zip(requests, futures, strict=True):
        assert np.abs(future.result(300).images - pipe(**request).images).max() <= 1 / 255
    assert buckets == [6, 6, 2, 2, 2]


def test_steps_leave_out_idle_slots_behind_the_last_in_use(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, buckets: list[int], gate: Gate
) -> None:
    bound, bind = list[tuple[int, int]](), OnnxRuntimeEngine.bind

    def seen(engine: OnnxRuntimeEngine, tensors: Mapping[str, Tensor]) -> BoundEngine:
        if "rows_of_image" in tensors:
            bound.append((tensors["prediction"].shape[0], tensors["latents"].shape[0]))
        return bind(engine, tensors)

    monkeypatch.setattr(OnnxRuntimeEngine, "bind", seen)
    requests = [{**SMALL, "prompt": "a star", "seed": 1, "num_inference_steps": steps} for steps in (8, 6, 2, 4, 4, 4)]
    with Batcher(pipe, slots=6, rows=12) as batcher:
        futures = []
        for number, request in enumerate(requests):
            futures.append(batcher.submit(**request))
            if number < 2:
                gate.run(1)
        gate.open()
        pictures = [future.result(300).images for future in futures]
    assert buckets == [2, 4, 12, 12, 10, 10, 4, 2]
    assert bound == [(2, 1), (4, 2), (12, 6), (12, 6), (10, 6), (10, 6), (4, 2), (2, 1)]
    for request, picture in zip(requests, pictures, strict=True):
        assert np.abs(picture - pipe(**request).images).max() <= 1 / 255


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ({"guidance_interval": (0.25, 0.75)}, [1, 1, 2, 2, 2, 2, 1, 1]),
        ({"guidance_reuse": 0.5}, [2, 2, 2, 2, 1, 1, 1, 1]),
        ({"guidance_interval": (0.0, 0.01)}, [1] * 8),
        ({"guidance_interval": (0.25, 0.75), "guidance_scale": 1.0}, [1] * 8),
    ],
    ids=str,
)
def test_an_image_that_is_guided_in_part_has_two_rows_there(
    pipe: Pipeline, batcher: Batcher, part: dict[str, Any], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, step = list[int](), Slots.step
    monkeypatch.setattr(Slots, "step", lambda slots, bucket: (used.append(slots.used), step(slots, bucket))[1])
    request = {**SMALL, "prompt": "a star", "seed": 1, "sampler": "euler_a", "num_inference_steps": 8, **part}
    assert np.abs(batcher.submit(**request).result(300).images - pipe(**request).images).max() <= 1 / 255
    assert used == rows


PICTURE = Image.new("RGB", (64, 64), "orange")
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((0, 32), (0, 0))))


@pytest.mark.parametrize(
    "request_",
    [
        {"num_images_per_prompt": 2},
        {"prompt": ["a star", "a circle"], "seed": [7, 3], "guidance_scale": 1.0},
        {"image": PICTURE, "strength": 0.6},
        {"image": PICTURE, "strength": 0.6, "sampler": "euler_a"},
        {"image": PICTURE, "mask_image": MASK},
        {"image": [PICTURE, Image.new("RGB", (64, 64), "green")], "mask_image": MASK, "num_images_per_prompt": 2},
        {"prompt": "a (star:1.3)", "prompt_syntax": "a1111"},
        {"prompt": "a star " * 60, "prompt_syntax": "a1111", "guidance_scale": 1.0},
        {"sampler": "dpmpp_2m", "num_inference_steps": 24, "forecast": "spectrum"},
        pytest.param({"sampler": "ddim", "num_inference_steps": 130}, marks=pytest.mark.long),
        {"sampler": "ddpm", "num_inference_steps": 6},
        {"sigmas": [10.0, 3.0, 1.0, 0.0], "sampler": "euler"},
        {"num_inference_steps": 8, "guidance_interval": (0.2, 0.7)},
        {"num_inference_steps": 8, "guidance_reuse": 0.5, "sampler": "euler_a"},
        {"latents": np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)},
        {"output_type": "latent"},
    ],
    ids=lambda request_: ", ".join(map(str, request_)),
)
def test_whatever_a_pipeline_draws(pipe: Pipeline, batcher: Batcher, request_: dict[str, Any]) -> None:
    request = {**SMALL, "prompt": "a star", "seed": 5, "num_inference_steps": 3, **request_}
    if "sigmas" in request_:
        del request["num_inference_steps"]
    beside = batcher.submit(**{**SMALL, "prompt": "a red circle", "seed": 6, "num_inference_steps": 8})
    result, expected = batcher.submit(**request).result(300), pipe(**request)
    assert result.seeds == expected.seeds and result.request == expected.request
    assert result.images.shape == expected.images.shape and result.images.dtype == expected.images.dtype
    tolerance = 1e-4 if request["output_type"] == "latent" else 1 / 255
    assert np.abs(result.images - expected.images).max() <= tolerance
    assert beside.result(300).images.shape == (1, 64, 64, 3)


def test_embeddings_stand_in_place_of_prompts(pipe: Pipeline, batcher: Batcher) -> None:
    rows = pipe.session.encode_prompt(pipe._batches.tokens("a star"))["context"]
    request = {**SMALL, "prompt_embeds": rows, "seed": 5, "num_inference_steps": 3}
    for more in ({}, {"negative_prompt_embeds": rows * 0.5}, {"guidance_scale": 1.0}):
        pictures = batcher.submit(**request, **more).result(300).images
        assert np.abs(pictures - pipe(**request, **more).images).max() <= 1 / 255


def test_pictures_are_pil_by_default_and_pasted_where_they_were_cut(pipe: Pipeline, batcher: Batcher) -> None:
    request: dict[str, Any] = {"prompt": "a star", "seed": 5, "num_inference_steps": 2, "height": 64, "width": 64}
    request |= {"image": PICTURE, "mask_image": MASK, "padding_mask_crop": 4}
    result = batcher.submit(**request).result(300)
    difference = np.asarray(result.images[0], int) - np.asarray(pipe(**request).images[0], int)
    assert np.abs(difference).max() <= 1
    times = result.timings
    assert times.steps == 2 and times.total >= times.denoise > 0 and times.decode > 0 and times.encode > 0


@pytest.mark.parametrize("slots", [1, 2])
def test_a_generator_of_a_caller_is_left_where_the_drawing_ended(pipe: Pipeline, slots: int) -> None:
    torch = pytest.importorskip("torch")
    request = {**SMALL, "prompt": "a star", "num_inference_steps": 3, "sampler": "euler_a", "num_images_per_prompt": 2}
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with Batcher(pipe, slots=slots, fixed_rows=True) as batcher:
        pictures = batcher.submit(**request, generator=one).result(300).images
    assert np.abs(pictures - pipe(**request, generator=other).images).max() <= 1 / 255
    assert torch.equal(one.get_state(), other.get_state())


def test_noise_is_drawn_when_its_step_comes(pipe: Pipeline) -> None:
    request = {**SMALL, "prompt": "a star", "seed": 5, "num_inference_steps": 50, "sampler": "euler_a"}
    with Batcher(pipe, slots=1) as batcher:
        job = batcher._job({**request, "num_images_per_prompt": 2})
        job.prepare_early()
    noise = job.images[1].prepared.noise  # type: ignore[union-attr]
    drawn = [noise.at(step, (4, 8, 8)) for step in (0, 1, 1, 2)]
    generator = Generator(6)
    expected = [generator.randn((4, 8, 8)) for _ in range(4)][1:]  # the first one is where the image starts
    for one, other in zip(drawn, (expected[0], expected[1], expected[1], expected[2]), strict=True):
        np.testing.assert_array_equal(one, other)
