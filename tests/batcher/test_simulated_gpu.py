"""The batcher on a simulated GPU: work that waits in a stream, captured steps, and engines for fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher

from ..engines import simulated_backends
from ..engines.simulated_cuda import SimulatedDriver

SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np"}
REQUESTS: list[dict[str, Any]] = [
    {**SMALL, "prompt": "a star", "seed": 1, "sampler": "euler_a", "num_inference_steps": 5},
    {**SMALL, "prompt": "a circle", "seed": 2, "sampler": "dpmpp_2m", "num_inference_steps": 3, "guidance_scale": 1.0},
    {**SMALL, "prompt": "a cross", "seed": 3, "sampler": "unipc", "num_inference_steps": 4},
    {**SMALL, "prompt": "a square", "seed": 4, "sampler": "ddpm", "num_inference_steps": 6},
]


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver()


@pytest.fixture(params=["onnxruntime-cuda", "tensorrt"])
def pipe(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    driver: SimulatedDriver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pipeline]:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    if request.param == "tensorrt":
        cache = EngineCache(tmp_path_factory.mktemp("plans"))
        backend: Any = simulated_backends.tensorrt_backend(monkeypatch, cache, driver)
    else:
        backend = simulated_backends.onnxruntime_backend(monkeypatch, driver)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as opened:
        yield opened


def test_a_crowd_gives_the_pictures_of_each_alone(pipe: Pipeline, driver: SimulatedDriver) -> None:
    expected = [pipe(**request).images for request in REQUESTS]
    before = dict(driver.live)
    with Batcher(pipe, slots=2, fixed_rows=True) as batcher:
        alone = [batcher.submit(**request).result(300).images for request in REQUESTS]
        lost = batcher.submit(**{**REQUESTS[0], "num_inference_steps": 40})
        crowd = [batcher.submit(**request) for request in REQUESTS]
        assert lost.cancel()
        for future, one, pictures in zip(crowd, alone, expected, strict=True):
            np.testing.assert_array_equal(future.result(300).images, one)
            assert np.abs(one - pictures).max() <= 1 / 255
    for kind in ("memory", "pinned"):
        assert driver.live[kind] <= before[kind], kind
