"""Failures half-way, forks, senseless input: one clear error, nothing left behind, the next request right."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import EngineError, LatentRTError, RequestError, SchedulerError
from latentrt.runtime import Pipeline
from latentrt.runtime.request import GenerationRequest
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.catalog import SAMPLERS
from PIL import Image

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "height": 64, "width": 64}
PICTURE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(params=[False, True], ids=["engines stay", "low memory"])
def pipe(request: pytest.FixtureRequest, tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, low_memory=request.param) as opened:
        yield opened


class OutOfMemory(EngineError):
    """What a device raises that has no memory left."""


@pytest.mark.parametrize("image", [None, PICTURE], ids=["text", "image"])
def test_memory_that_ends_at_any_allocation_is_given_back(
    pipe: Pipeline, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, request = pipe.backend.device, {**REQUEST, "image": image}
    empty, left = device.empty, 0

    def scarce(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            raise OutOfMemory("no memory is left")
        left -= 1
        return empty(*arguments)

    monkeypatch.setattr(device, "empty", scarce)
    failures = 0
    while True:
        left = failures
        before = device.tensor_bytes()
        try:
            after_failures = pipe(**request).images[0]
            break
        except OutOfMemory:
            assert device.tensor_bytes() == before
            failures += 1
    assert failures > 15
    with Pipeline(pipe.bundle, pipe.backend) as fresh:
        left = 10**6
        assert np.array_equal(np.asarray(fresh(**request).images[0]), np.asarray(after_failures))


@pytest.mark.parametrize("place", ["bind", "enqueue"])
def test_an_engine_that_fails_leaves_the_pipeline_as_it_was(
    pipe: Pipeline, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.engines.onnxruntime import cpu, session

    expected = np.asarray(pipe(**REQUEST).images[0])
    kind = session.OnnxRuntimeEngine if place == "bind" else cpu.OnnxRuntimeBinding
    ordinary, left = getattr(kind, place), 0

    def failing(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise EngineError("the engine failed")
        return ordinary(*arguments)

    other = {**REQUEST, "height": 80}  # a shape that binds anew
    used = pipe.backend.device.tensor_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(kind, place, failing)
        for left in range(1, 6):  # noqa: B007 (the failing call counts it down)
            pipe.session.prompts.clear()  # so that all engines run
            with pytest.raises(EngineError, match="the engine failed"):
                pipe(**other)
            if place == "bind" and not pipe.session.low_memory:
                assert pipe.backend.device.tensor_bytes() == used
    assert np.array_equal(np.asarray(pipe(**REQUEST).images[0]), expected)
    assert pipe(**other).images[0].size == (64, 80)


def test_opening_that_fails_closes_what_was_opened(tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrt.engines.onnxruntime import cpu

    closed: list[str] = []
    ordinary, opened = cpu.OnnxRuntimeCpu.open, []

    def failing(self: Any, bundle: Any, graph: Any, shapes: Any = None) -> Any:
        if len(opened) == 2:
            raise EngineError("no third engine")
        engine = ordinary(self, bundle, graph, shapes)
        opened.append(graph.name)
        close = engine.close
        engine.close = lambda: (closed.append(engine.name), close())
        return engine

    monkeypatch.setattr(cpu.OnnxRuntimeCpu, "open", failing)
    with pytest.raises(EngineError, match="no third engine"):
        Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu")
    assert closed == opened


FORK = """
import os, sys
from latentrt.engines.errors import EngineError
from latentrt.runtime import Pipeline
pipe = Pipeline.open(sys.argv[1], "onnxruntime-cpu", threads=2)
pipe("a", num_inference_steps=1)
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    pipe("a", num_inference_steps=1)
    pipe.close()
    sys.exit(os.waitstatus_to_exitcode(status))
try:
    pipe("a", num_inference_steps=1)
except EngineError as error:
    assert "open a pipeline in each worker process" in str(error), error
    pipe.close()
    sys.exit(0)
sys.exit("the child drew")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_is_told_and_ends(tiny_sd15_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_sd15_bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_numbers_that_are_not_finite_are_errors_that_name_the_stage(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.asarray(pipe(**REQUEST).images[0])
    nan = {"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}
    with pytest.raises(RequestError, match="return finite latents"):
        pipe(**REQUEST, callback_on_step_end=lambda *_: nan)
    from latentrt.runtime.loop.denoise import DenoiseLoop

    ordinary = DenoiseLoop.run

    def broken(self: DenoiseLoop, steps: int, stream: Any, **options: Any) -> Any:
        tensor = ordinary(self, steps, stream, **options)
        tensor.write(nan["latents"], stream)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(DenoiseLoop, "run", broken)
        for output_type in ("pil", "np", "latent"):
            with pytest.raises(EngineError, match="the denoiser gave latents that are not finite"):
                pipe(**REQUEST, output_type=output_type)
    huge = {"latents": np.full((1, 4, 16, 16), 3e38, np.float32)}

    def last(_: Any, step: int, *__: Any) -> Any:
        return huge

    with pytest.raises(EngineError, match="are not finite"):
        pipe(**REQUEST, callback_on_step_end=last)
    assert np.array_equal(np.asarray(pipe(**REQUEST).images[0]), expected)


def test_eta_is_not_dropped_in_silence(pipe: Pipeline) -> None:
    assert "eta is 0.5: sampler euler has no such option" in pipe(**REQUEST, sampler="euler", eta=0.5).warnings[0]
    assert pipe(**REQUEST, sampler="ddim", eta=0.5).warnings == []


def test_what_did_not_fit_is_named_in_the_prompt_s_own_words(pipe: Pipeline) -> None:
    words = ["circle"] * 80 + ["Blue-Ending"]
    result = pipe(**{**REQUEST, "prompt": " ".join(words)}, num_images_per_prompt=2)
    (warning,) = result.warnings
    assert result.tokens_cut == len(pipe._batches.tokenizers[0].text_ids(" ".join(words))) - 75
    assert "</w>" not in warning and "is longer than 75 tokens" in warning and "circle" in warning.rpartition(":")[2]


def test_pictures_are_let_go_when_they_need_not_be_kept(pipe: Pipeline) -> None:
    seen: list[int] = []
    result = pipe(
        ["a", "b", "c", "d", "e"],
        num_inference_steps=1,
        keep_images=False,
        on_batch=lambda _, first, images: seen.extend(range(first, first + len(images))),
    )
    assert seen == [0, 1, 2, 3, 4] and result.images == [] and len(result.seeds) == 5


def test_ten_thousand_prompts_cost_no_time_of_their_own() -> None:
    request = GenerationRequest(prompt=tuple(map(str, range(10_000))), seed=1)
    assert request.images is request.images and len(request.images) == 10_000


@pytest.mark.parametrize("text", ["half \ud83d", "\udc80", "caf\udce9"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_text_that_is_no_unicode_is_refused(text: str, field: str) -> None:
    with pytest.raises(RequestError, match="half of a pair, which is no text"):
        GenerationRequest.of(**{"prompt": "a", field: text})


WRONG: list[Any] = [None, "abc", "", -1, 0, 10**12, 1.5, -0.5, float("nan"), float("inf"), [], [1, 2], {}, True, False]


def test_mutated_scheduler_configs_are_tables_or_one_clear_error() -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(3000):
        name = generator.choice(sorted(SAMPLERS))
        config = {**SAMPLERS[name].defaults, "_class_name": name}
        for key in generator.sample(sorted(config), generator.choice((1, 1, 2, 3))):
            config[key] = generator.choice(WRONG)
        try:
            table = step_table(config, 4)
            assert np.isfinite(table.weights).all()
        except LatentRTError as error:
            assert isinstance(error, (SchedulerError, RequestError)) and "\n" not in str(error)
            refused += 1
    assert 500 < refused < 3000
