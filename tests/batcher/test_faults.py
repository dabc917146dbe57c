"""What goes wrong for one image or one step harms nobody else, and the batcher lives on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.device import Array
from latentrt.engines.errors import BundleError, DeadlineError, EngineError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.batcher.pool import Pool
from latentrt.runtime.batcher.slots import Slots
from latentrt.runtime.loop.decoding import Decoding

from .conftest import Gate

SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}
ONE: dict[str, Any] = {**SMALL, "prompt": "a red circle", "seed": 1, "sampler": "dpmpp_2m"}
OTHER: dict[str, Any] = {**SMALL, "prompt": "a star", "seed": 2, "sampler": "euler_a", "guidance_scale": 1.0}
LONG: dict[str, Any] = {**ONE, "seed": 3, "num_inference_steps": 50}


@pytest.fixture
def batcher(pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe, slots=3, fixed_rows=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> list[Array]:
    with Batcher(pipe, slots=3, fixed_rows=True) as batcher:
        return [batcher.submit(**request).result(300).images for request in (ONE, OTHER)]


def test_a_prompt_that_cannot_be_encoded_again_ends_its_request_alone(
    batcher: Batcher, expected: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, conditioning = list[int](), Encoder.conditioning

    def failing(encoder: Encoder, inputs: dict[str, Array]) -> dict[str, Array]:
        calls.append(len(inputs["token_ids"]))
        if len(calls) == 2:
            raise EngineError("the encoder is gone")
        return conditioning(encoder, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "conditioning", failing)
        future = batcher.submit(**ONE, guidance_interval=(0.5, 1.0))
        with pytest.raises(EngineError, match="the encoder is gone"):
            future.result(300)
    assert future.progress().done == 2
    assert_well(batcher, expected)


def assert_well(batcher: Batcher, expected: list[Array]) -> None:
    for future, images in zip([batcher.submit(**request) for request in (ONE, OTHER)], expected, strict=True):
        np.testing.assert_array_equal(future.result(300).images, images)
    assert (batcher.waiting, batcher.running) == (0, 0)


class FailingSteps:
    """Steps that fail after they have written everything that a step writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.error = 0, EngineError("the device had enough")
        enqueue = Slots._enqueue

        def failing(pair: Any, stream: Any) -> None:
            enqueue(pair, stream)
            if self.left:
                self.left -= 1
                raise self.error

        monkeypatch.setattr(Slots, "_enqueue", staticmethod(failing))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailingSteps:
    return FailingSteps(monkeypatch)


@pytest.fixture
def eager() -> Iterator[Pipeline]:
    """A pipeline whose steps are not captured, so that each is enqueued anew."""
    with Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1, mode="eager") as opened:
        yield opened


def test_a_step_that_fails_once_is_run_again(
    eager: Pipeline, failing: FailingSteps, gate: Gate, expected: list[Array]
) -> None:
    with Batcher(eager, slots=3, fixed_rows=True) as batcher:
        futures = [batcher.submit(**request) for request in (ONE, OTHER)]
        for turn in range(4):
            failing.left = turn % 2
            gate.run(1)
        gate.open()
        for future, images in zip(futures, expected, strict=True):
            np.testing.assert_array_equal(future.result(300).images, images)


@pytest.mark.parametrize("kind", [EngineError, RuntimeError, MemoryError])
def test_a_step_that_fails_twice_ends_its_images_and_no_others(
    eager: Pipeline, failing: FailingSteps, gate: Gate, expected: list[Array], kind: type[Exception]
) -> None:
    failing.error = kind("the device had enough")  # type: ignore[assignment]
    with Batcher(eager, slots=1, rows=2) as batcher:
        running, waiting = batcher.submit(**ONE), batcher.submit(**OTHER)
        gate.run(2)
        failing.left = 2
        gate.run(1)
        failing.left = 0
        with pytest.raises(kind, match="the device had enough"):
            running.result(300)
        gate.open()
        assert np.abs(waiting.result(300).images - expected[1]).max() <= 1e-4
        assert np.abs(batcher.submit(**ONE).result(300).images - expected[0]).max() <= 1e-4


def test_no_numbers_fail_one_request_alone(batcher: Batcher, poison: str, expected: list[Array]) -> None:
    lost = batcher.submit(**{**ONE, "prompt": ["a star", poison], "seed": 1})
    assert_well(batcher, expected)
    with pytest.raises(EngineError, match="the denoiser gave latents that are not finite: the bundle's weights"):
        lost.result(300)
    assert_well(batcher, expected)  # in the slots of those that were lost


def test_pixels_that_are_no_numbers_fail_one_request_alone(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    decode = Encoder.decode

    def broken(encoder: Encoder, latents: Array, decoding: Decoding) -> dict[str, Array]:
        return {**decode(encoder, latents, decoding), "pixels": np.full((1, 64, 64, 3), np.nan, np.float32)}

    monkeypatch.setattr(Encoder, "decode", broken)
    lost = batcher.submit(**{**ONE, "output_type": "pil"})
    assert_well(batcher, expected)
    with pytest.raises(EngineError, match="the decoder gave pixels that are not finite"):
        lost.result(300)


def test_a_prompt_that_cannot_be_encoded_fails_one_request_alone(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    conditioning, calls = Encoder.conditioning, []

    def broken(encoder: Encoder, inputs: dict[str, Array]) -> dict[str, Array]:
        calls.append(inputs)
        if len(calls) == 1:
            raise EngineError("the encoder had enough")
        return conditioning(encoder, inputs)

    monkeypatch.setattr(Encoder, "conditioning", broken)
    lost = batcher.submit(**LONG)
    with pytest.raises(EngineError, match="the encoder had enough"):
        lost.result(300)
    assert_well(batcher, expected)


def test_a_slot_that_cannot_be_written_ends_what_is_in_flight(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, expected: list[Array], gate: Gate
) -> None:
    admit, calls = Slots.admit, []

    def broken(slots: Slots, *image: Any) -> int:
        calls.append(image)
        if len(calls) == 2:
            raise EngineError("a copy failed")
        return admit(slots, *image)

    monkeypatch.setattr(Slots, "admit", broken)
    futures = [batcher.submit(**ONE) for _ in range(3)]
    gate.open()
    for future in futures[:2]:
        with pytest.raises(EngineError, match="a copy failed"):
            future.result(300)
    np.testing.assert_array_equal(futures[2].result(300).images, expected[0])
    assert_well(batcher, expected)


def test_buffers_that_cannot_be_had_fail_what_waits(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, expected: list[Array]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "opened", lambda pool: (_ for _ in ()).throw(EngineError("no memory")))
        for future in [batcher.submit(**ONE), batcher.submit(**OTHER)]:
            with pytest.raises(EngineError, match="no memory"):
                future.result(300)
    assert_well(batcher, expected)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_cancelled_request_frees_its_place_at_once(
    batcher: Batcher, gate: Gate, expected: list[Array], turns: int
) -> None:
    lost = batcher.submit(**{**LONG, "num_images_per_prompt": 4})
    others = [batcher.submit(**request) for request in (ONE, OTHER)]
    gate.run(turns)
    assert lost.cancel() and lost.cancelled()
    gate.run(1)
    assert (batcher.waiting, batcher.running) == (0, 2)
    gate.open()
    for future, images in zip(others, expected, strict=True):
        np.testing.assert_array_equal(future.result(300).images, images)
    with pytest.raises(CancelledError):
        lost.result(0)
    assert_well(batcher, expected)


def test_those_who_wait_for_a_cancelled_request_hear_of_it(batcher: Batcher, gate: Gate) -> None:
    lost: Future[Any] = batcher.submit(**LONG)
    gate.run(1)
    lost.cancel()
    gate.open()
    assert wait([lost], timeout=300).not_done == set()


def test_a_finished_request_cannot_be_cancelled(batcher: Batcher) -> None:
    future = batcher.submit(**ONE)
    future.result(300)
    assert not future.cancel() and future.done()


def test_a_request_that_is_late_fails_and_frees_its_place(
    batcher: Batcher, gate: Gate, expected: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = batcher.submit(**LONG, timeout=1000.0)
    in_time = batcher.submit(**ONE, timeout=1_000_000.0)
    gate.run(2)
    clock = time.monotonic
    monkeypatch.setattr("latentrt.runtime.batcher.pool.time.monotonic", lambda: clock() + 2000.0)
    gate.open()
    with pytest.raises(DeadlineError, match=r"the result was not there in time, 200\d\.\d s after its request"):
        running.result(300)
    with pytest.raises(TimeoutError):
        running.result(300)
    np.testing.assert_array_equal(in_time.result(300).images, expected[0])


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "5", [5]])
def test_a_timeout_is_more_than_nothing(batcher: Batcher, timeout: Any) -> None:
    with pytest.raises(RequestError, match=r"timeout is .*: give seconds, more than 0"):
        batcher.submit(**ONE, timeout=timeout)


def test_a_closed_pipeline_fails_what_is_there_and_what_comes(gate: Gate) -> None:
    pipe = Pipeline.open(ensure_bundle(), "onnxruntime-cpu", threads=1)
    with Batcher(pipe, slots=1) as batcher:
        futures = [batcher.submit(**ONE), batcher.submit(**OTHER)]
        gate.run(1)
        gate.open()
        pipe.close()
        for future in futures:
            assert isinstance(future.exception(300), EngineError) or future.result()
        with pytest.raises(EngineError, match="the pipeline is closed: open it again"):
            batcher.submit(**ONE).result(300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt is None: give a text"),
        ({"height": 63}, "height is 63: this bundle needs a multiple of 8"),
        ({"sampler": "none"}, "none"),
        ({"cross_attention_kwargs": {"scale": 1}}, "cross_attention_kwargs"),
        ({"callback_on_step_end": print}, "callback_on_step_end is given: images of a batcher come and go"),
        ({"on_batch": print}, "on_batch is given"),
        ({"progress": print}, "progress is given"),
        ({"return_dict": False}, "return_dict is given"),
        ({"on_event": 5}, "on_event is 5: give a function, or leave it out"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(batcher: Batcher, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        batcher.submit(**{**ONE, **arguments})


def test_a_bundle_whose_steps_are_not_of_one_image_is_refused(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step = pipe.bundle.graph("step")
    strange = step.inputs[0].model_copy(update={"name": "temperature", "shape": (1,)})
    changed = step.model_copy(update={"inputs": (*step.inputs, strange)})
    graph = Bundle.graph
    monkeypatch.setattr(Bundle, "graph", lambda bundle, name: changed if name == "step" else graph(bundle, name))
    with pytest.raises(BundleError, match="has 'temperature' in its steps, which is of no image alone: use pipe"):
        Batcher(pipe)
