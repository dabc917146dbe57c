"""Eight threads, four hundred requests of every kind: each picture is the one that it is alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.backends import Backend, open_backend
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline

from ..engines.simulated_backends import tensorrt_backend

pytestmark = pytest.mark.slow

THREADS, EACH, KINDS = 8, 50, 20
SIDES = [(32, 32), (32, 32), (48, 32)]
PROMPTS = ["a red circle", "a blue star", "two green rings", "", "a yellow square on black"]
SAMPLERS = ["ddim", "euler_a", "dpmpp_2m_karras", "unipc", "plms", "lcm", None]


def requests(generator: random.Random) -> list[dict[str, Any]]:
    """Return requests of every kind, each with a seed of its own."""
    found = []
    for number in range(KINDS):
        width, height = generator.choice(SIDES)
        prompts = generator.sample(PROMPTS, generator.choice((1, 1, 1, 2)))
        request: dict[str, Any] = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "negative_prompt": generator.choice([None, "blurry"]),
            "seed": number * 100,
            "width": width,
            "height": height,
            "num_inference_steps": generator.choice((2, 3)),
            "guidance_scale": generator.choice((1.0, 3.0, 7.5)),
            "sampler": generator.choice(SAMPLERS),
            "num_images_per_prompt": generator.choice((1, 1, 2)),
            "output_type": generator.choice(("pil", "np", "latent")),
        }
        if number % 3:
            request["image"] = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
            request["strength"] = generator.choice((0.6, 1.0))
        if number % 3 == 2:
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 255
            request["mask_image"] = mask
        found.append(request)
    return found


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take over from each other as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["onnxruntime-cpu", "simulated tensorrt"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    cache = EngineCache(tmp_path)
    if request.param == "onnxruntime-cpu":
        return open_backend("onnxruntime-cpu", threads=1, cache=cache)
    return tensorrt_backend(monkeypatch, cache)


def draw(pipe: Pipeline, request: dict[str, Any]) -> Any:
    result = pipe(**request)
    assert len(result.images) == len(result.seeds)
    return np.stack([np.asarray(image) for image in result.images])


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pipelines", [1, 2])
def test_pictures_of_threads_are_those_of_a_quiet_pipeline(backend: Backend, pipelines: int) -> None:
    generator = random.Random(pipelines)
    asked, bundle = requests(generator), Bundle.open(BUNDLE)
    before = backend.device.tensor_bytes()
    pipes = [Pipeline(bundle, backend, max_batch=3) for _ in range(pipelines)]
    alone = [draw(pipes[0], request) for request in asked]
    order = [number % KINDS for number in range(THREADS * EACH)]
    generator.shuffle(order)

    def same(number: int) -> bool:
        kind = order[number]
        return np.array_equal(draw(pipes[number % pipelines], asked[kind]), alone[kind])

    with ThreadPoolExecutor(THREADS) as pool:
        for number, equal in enumerate(pool.map(same, range(len(order)))):
            assert equal, asked[order[number]]
    for pipe in pipes:
        pipe.close()
    assert backend.device.tensor_bytes() == before
