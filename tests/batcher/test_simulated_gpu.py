"""The batcher on a simulated GPU: work that waits in a stream, captured steps, and engines for fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, MissingPlanError, RequestError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt.plan import PLAN
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.cli import run
from latentrt.runtime.service.counts import memory_of
from PIL import Image

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


def test_buckets_of_fixed_shapes_share_a_plan(
    monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    cache = EngineCache(tmp_path / "plans")
    backend = simulated_backends.tensorrt_backend(monkeypatch, cache, driver)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe, Batcher(pipe, slots=4) as batcher:
        batcher.warm_up([(64, 64)], pictures=False)
        assert sorted(batcher.stats().curve) == [1, 2, 4, 6, 8]
        plans = [entry["graph"] for entry in cache.entries()]
        assert sorted(plans) == sorted(set(plans)) and {"denoiser", "step", "decoder"} <= set(plans)
        held = memory_of(batcher)
        for entry in cache.entries():  # what several engines share counts once
            nbytes = (entry["folder"] / PLAN).stat().st_size
            assert held["weights"][entry["graph"]] == pytest.approx(nbytes, abs=len(plans))
        assert held["buffers"].total() == pipe.backend.device.tensor_bytes()
        expected = [batcher.submit(**request).result(300).images for request in REQUESTS]
        found = [batcher.submit(**request) for request in REQUESTS]
        for future, images in zip(found, expected, strict=True):
            assert np.abs(future.result(300).images - images).max() <= 1 / 255
        assert len(batcher.stats().steps) > 1
        assert len(list(cache.entries())) == len(plans)


def test_without_building_only_sizes_with_engines_are_served(
    monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    cache = EngineCache(tmp_path / "plans")
    backend = simulated_backends.tensorrt_backend(monkeypatch, cache, driver)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe:
        with Batcher(pipe, slots=1) as batcher:
            batcher.warm_up([(64, 64)])
        before = len(list(cache.entries()))
        with Batcher(pipe, slots=1, build=False) as batcher:
            message = (
                r"72x64 has no engines, and none are built for a request: the sizes here are none yet; no tensorrt"
            )
            with pytest.raises(RequestError, match=message):
                batcher.submit("a star", width=72, height=64)
            picture = Image.new("RGB", (64, 64))
            assert batcher.submit(**REQUESTS[0]).result(300)
            assert batcher.submit(**REQUESTS[0], image=picture).result(300)
            with pytest.raises(RequestError, match="the sizes here are 64x64"):
                batcher.submit("a star", width=64, height=72)
        assert len(list(cache.entries())) == before
        with Batcher(pipe, slots=1, build=False) as batcher:
            batcher.warm_up([(72, 64)])
            assert batcher.submit(**{**REQUESTS[0], "width": 72}).result(300)


def test_without_building_what_a_warm_up_left_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    backend = simulated_backends.tensorrt_backend(monkeypatch, EngineCache(tmp_path / "plans"), driver)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe, Batcher(pipe, slots=1, build=False) as batcher:
        batcher.warm_up([(64, 64)], pictures=False)
        assert batcher.submit(**REQUESTS[0]).result(300)
        with pytest.raises(RequestError, match=r"64x64 has no engines, .*no tensorrt plan of image_encoder"):
            batcher.submit(**REQUESTS[0], image=Image.new("RGB", (64, 64)))
        with monkeypatch.context() as patch, pytest.raises(EngineError, match="the decoder had enough"):
            patch.setattr(Encoder, "decode", lambda *_: (_ for _ in ()).throw(EngineError("the decoder had enough")))
            batcher.warm_up([(72, 64)])
        with pytest.raises(RequestError, match=r"72x64 has no engines, .*no tensorrt plan of decoder"):
            batcher.submit(**{**REQUESTS[0], "width": 72})
        assert len(batcher._queue.warm) == 1


@pytest.mark.parametrize("numbers", [["--slots=3"], ["--slots=2", "--rows=2", "--fixed-rows"]], ids=str)
def test_a_batcher_finds_what_was_built_for_its_numbers(
    monkeypatch: pytest.MonkeyPatch, driver: SimulatedDriver, tmp_path: Path, numbers: list[str]
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    backend = simulated_backends.tensorrt_backend(monkeypatch, EngineCache(), driver)
    build = ["build", str(ensure_bundle()), "--backend=tensorrt", "--size=64x64", *numbers]
    assert run(build) == 0
    plans = len(list(EngineCache().entries()))
    backend = simulated_backends.tensorrt_backend(monkeypatch, EngineCache(), driver, build=False)
    options = {name: int(value or 1) for name, _, value in (each[2:].partition("=") for each in numbers)}
    fixed = bool(options.pop("fixed-rows", 0))
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe:
        with Batcher(pipe, **options, fixed_rows=fixed, build=False) as batcher:
            batcher.warm_up([(64, 64)])
            futures = [batcher.submit(**request) for request in REQUESTS]
            assert all(np.isfinite(future.result(300).images).all() for future in futures)
            assert batcher.submit(**REQUESTS[0], image=Image.new("RGB", (64, 64))).result(300)
        with Batcher(pipe, slots=5) as batcher, pytest.raises(MissingPlanError):
            batcher.warm_up([(64, 64)])
    assert len(list(EngineCache().entries())) == plans


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows=4"], "--rows is given without --slots"),
        (["--fixed-rows"], "--fixed-rows is given without --slots"),
        (["--slots=4", "--rows=3"], "rows is 3: give a whole number from 4 to 1024"),
        (["--slots=4", "--batch=2"], "--slots and --batch are given"),
        (["--slots=4", "--dynamic"], "--slots and --dynamic are given"),
    ],
    ids=str,
)
def test_numbers_of_a_batcher_that_cannot_be(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(ensure_bundle()), *arguments]) == 2
    assert said in capsys.readouterr().err
