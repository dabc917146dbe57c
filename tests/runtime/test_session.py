"""Threads that share a pipeline or a backend, callbacks that ask for more, and the end of a session."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.backends import open_backend
from latentrt.engines.errors import EngineError, RequestError
from latentrt.runtime import Bundle, Pipeline

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a blue star", "seed": 2, "sampler": "euler_a", "num_inference_steps": 3},
    {"prompt": "a green cross", "seed": 3, "guidance_scale": 1.0},
    {"prompt": "two circles", "seed": 4, "num_images_per_prompt": 2, "output_type": "latent"},
]


@pytest.fixture
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take over from each other as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def draw(pipe: Pipeline, request: dict[str, Any]) -> Any:
    return np.stack([np.asarray(image) for image in pipe(**{"num_inference_steps": 2, **request}).images])


def in_threads(pipes: list[Pipeline], rounds: int) -> list[tuple[int, Any]]:
    """Draw all requests from eight threads, each with a pipeline of the list, and return (request, picture)."""
    jobs = [(number % len(REQUESTS), pipes[number % len(pipes)]) for number in range(rounds * len(REQUESTS))]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda job: (job[0], draw(job[1], REQUESTS[job[0]])), jobs))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_on_one_pipeline_get_their_own_pictures(pipe: Pipeline) -> None:
    alone = [draw(pipe, request) for request in REQUESTS]
    for request, picture in in_threads([pipe], rounds=5):
        assert np.array_equal(picture, alone[request])


@pytest.mark.usefixtures("hasty_threads")
def test_threads_on_two_pipelines_of_one_backend_get_their_own_pictures(tiny_sd15_bundle: Path) -> None:
    bundle, backend = Bundle.open(tiny_sd15_bundle), open_backend("onnxruntime-cpu", threads=1)
    with Pipeline(bundle, backend) as first, Pipeline(bundle, backend, mode="eager") as second:
        alone = [draw(first, request) for request in REQUESTS]
        for request, picture in in_threads([first, second, first], rounds=4):
            assert np.array_equal(picture, alone[request])


def test_requests_on_one_backend_never_overlap(pipe: Pipeline) -> None:
    inside, most = 0, 0

    def look(*_: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.002)
        inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: pipe("a", seed=seed, num_inference_steps=3, callback_on_step_end=look), range(4)))
    assert most == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [(lambda pipe: pipe("another", num_inference_steps=1), "its own pipeline"), (Pipeline.close, "closed its own")],
)
def test_a_callback_cannot_use_its_own_pipeline(
    pipe: Pipeline, ask: Callable[[Pipeline], object], message: str
) -> None:
    expected = draw(pipe, REQUESTS[0])
    with pytest.raises(RequestError, match=message):
        pipe("a", num_inference_steps=2, callback_on_step_end=lambda *_: ask(pipe))  # type: ignore[func-returns-value]
    assert np.array_equal(draw(pipe, REQUESTS[0]), expected)


def test_previews_in_callbacks_are_what_the_end_would_be(pipe: Pipeline) -> None:
    previews: list[Any] = []

    def look(given: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        previews.append(np.asarray(given.decode(values["latents"])[0]))

    image = pipe("a red circle", seed=1, num_inference_steps=3, callback_on_step_end=look).images[0]
    assert np.array_equal(previews[-1], np.asarray(image))


def test_a_closed_pipeline_says_so(tiny_sd15_bundle: Path) -> None:
    pipe = Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1)
    pipe.close()
    pipe.close()
    for use in (lambda: pipe("a"), lambda: pipe.decode(np.zeros((1, 4, 8, 8)))):
        with pytest.raises(EngineError, match="the pipeline is closed"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast': choose eager, step, loop, request"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_batch": -2}, "max_batch is -2"),
        ({"max_batch": "4"}, "max_batch is '4'"),
        ({"max_batch": True}, "max_batch is True"),
    ],
)
def test_bad_options_are_refused(tiny_sd15_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", **options)


def test_what_a_session_holds_is_used_and_freed_while_nobody_else_has_the_backend(pipe: Pipeline) -> None:
    lock: Any = pipe.backend.lock
    held: list[bool] = []
    pipe("a", num_inference_steps=1, callback_on_step_end=lambda *_: held.append(lock._is_owned()))
    with pipe.session.turn():
        held.append(lock._is_owned())
    workspace = next(iter(pipe.session._workspaces.values()))
    close = workspace.close
    workspace.close = lambda: (held.append(lock._is_owned()), close())  # type: ignore[func-returns-value, method-assign]
    pipe.close()
    assert held == [True] * 3 and not lock._is_owned()
