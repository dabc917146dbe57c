"""What prompts were encoded to is kept, and nothing else changes: the same bits with it, without, and out of order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import GraphInfo, TensorInfo
from latentrt.engines.device import Array
from latentrt.engines.errors import RequestError
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeBinding
from latentrt.runtime import Pipeline
from latentrt.runtime.prompt.cache import PromptCache

QUICK: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}


def graph(name: str, stage: Any, inputs: str, outputs: str) -> GraphInfo:
    """Return the manifest's entry of a graph between named tensors."""

    def specs(names: str) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name=each, dtype="float32", shape=("R", "n")) for each in names.split())

    return GraphInfo(name=name, stage=stage, files=("f",), inputs=specs(inputs), outputs=specs(outputs), opset=20)


BUNDLE: Any = SimpleNamespace(
    manifest=SimpleNamespace(
        graphs=(
            graph("text_encoder", "prompt", "token_ids token_mask given", "hidden"),
            graph("projection", "prompt", "hidden given", "context unused"),
            graph("denoiser", "step", "model_input context token_mask", "prediction"),
        )
    )
)
"""Two prompt graphs, one behind the other; the denoiser reads one of three tensors that they write, and a mask."""
INPUTS: Mapping[str, Array] = {
    "token_ids": np.array([[1, 2, 0], [3, 0, 0]]),
    "token_mask": np.array([[1, 1, 0], [1, 0, 0]]),
    "given": np.ones((2, 1), np.float32),
}


def written(number: float, size: int = 4) -> dict[str, Array]:
    """Return what the graphs write: 2 rows of `size` float32."""
    return {name: np.full((2, size), number, np.float32) for name in ("hidden", "context", "unused")}


def test_what_later_graphs_read_is_kept_and_nothing_else() -> None:
    cache = PromptCache(BUNDLE)
    assert cache.get(INPUTS) is None
    cache.put(INPUTS, written(1))
    found = cache.get({**INPUTS, "beside": np.zeros(3)})
    assert found is not None and list(found) == ["context"] and cache.bytes == 32
    assert (found["context"] == 1).all() and (cache.hits, cache.misses) == (1, 1)
    with pytest.raises(ValueError, match="read-only"):
        found["context"][0] = 0
    cache.clear()
    assert cache.get(INPUTS) is None and cache.bytes == 0


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("change", ["value", "type", "rows", "order", "gone"])
def test_any_other_input_is_another_prompt(name: str, change: str) -> None:
    cache, array = PromptCache(BUNDLE), INPUTS[name]
    cache.put(INPUTS, written(1))
    other = {
        "value": array + array.dtype.type(1),
        "type": array.astype(np.int32),
        "rows": array.reshape(1, -1),
        "order": array[::-1] if name != "given" else array * array.dtype.type(0),
    }
    changed = {key: value for key, value in INPUTS.items() if key != name}
    assert cache.get(changed if change == "gone" else {**changed, name: other[change]}) is None
    assert cache.get(INPUTS) is not None


def test_the_least_recently_used_goes_first_and_bytes_are_bounded() -> None:
    cache = PromptCache(BUNDLE, 3 * 32)
    prompts = [{**INPUTS, "token_ids": INPUTS["token_ids"] + number} for number in range(5)]
    for number in range(3):
        cache.put(prompts[number], written(number))
    assert cache.get(prompts[0]) is not None and cache.bytes == 96
    cache.put(prompts[3], written(3))
    known = [number for number, prompt in enumerate(prompts) if cache.get(prompt) is not None]
    assert known == [0, 2, 3] and cache.bytes == 96
    cache.put(prompts[4], written(4, size=8))  # as large as two
    known = [number for number, prompt in enumerate(prompts) if cache.get(prompt) is not None]
    assert known == [3, 4] and cache.bytes == 96
    cache.put(prompts[0], written(0, size=13))  # larger than all there is
    assert cache.bytes == 96 and cache.get(prompts[0]) is None


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "1GiB"])
def test_numbers_that_cannot_be_are_refused(tiny_sd15_bundle: Path, wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"prompt_cache is .*: give bytes, 0 for none"):
        Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", prompt_cache=wrong)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that run, in order."""
    found, run = list[str](), OnnxRuntimeBinding._run

    def noted(binding: Any) -> None:
        found.append(binding._engine.name)
        run(binding)

    monkeypatch.setattr(OnnxRuntimeBinding, "_run", noted)
    return found


@pytest.fixture(scope="module")
def without(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, prompt_cache=0) as pipe:
        yield pipe


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a star", "seed": 1},
    {"prompt": "a star", "seed": 2},
    {"prompt": "a circle", "seed": 2},
    {"prompt": "a star", "seed": 1, "guidance_scale": 3.0},
    {"prompt": "a star", "seed": 1, "guidance_scale": 1.0},
    {"prompt": "a star", "seed": 1, "negative_prompt": "a circle"},
    {"prompt": ["a star", "a circle"], "seed": 4},
    {"prompt": ["a circle", "a star"], "seed": 4},
    {"prompt": "a star", "seed": 3, "num_images_per_prompt": 3},
    {"prompt": "a star", "seed": 7, "width": 80},
    {"prompt": "a (star:1.2)", "seed": 7, "prompt_syntax": "a1111"},
    {"prompt": "a (star:1.2)", "seed": 8, "prompt_syntax": "a1111"},
    {"prompt": "a circle", "seed": 9},
]
ENCODED = (1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0)
"""How often the text encoder runs for each, with a cache; a weight changes what is done with the same rows."""


@pytest.mark.parametrize("low_memory", [False, True], ids=["engines stay", "low memory"])
def test_pictures_are_the_same_bit_for_bit(
    tiny_sd15_bundle: Path, without: Pipeline, runs: list[str], low_memory: bool
) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, low_memory=low_memory) as pipe:
        opened, ordinary = list[str](), pipe.backend.open
        pipe.backend.open = lambda bundle, graph, shapes=None: (  # type: ignore[method-assign]
            opened.append(graph.name),
            ordinary(bundle, graph, shapes),
        )[1]
        for request, times in zip(REQUESTS, ENCODED, strict=True):
            expected = without(**{**QUICK, **request}).images
            runs.clear(), opened.clear()
            assert np.array_equal(pipe(**{**QUICK, **request}).images, expected), request
            assert runs.count("text_encoder") == times, request
            assert opened.count("text_encoder") == times * low_memory, request
        assert pipe.session.prompts.hits == 6


def test_the_batches_of_a_request_share_their_prompts(tiny_sd15_bundle: Path, runs: list[str]) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=2, low_memory=True) as pipe:
        pipe("a star", seed=1, num_images_per_prompt=6, **QUICK)
    assert runs.count("text_encoder") == 1 and runs.count("denoiser") == 9


def test_a_request_that_fails_keeps_nothing(tiny_sd15_bundle: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("cancelled")

    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        with pytest.raises(KeyError):
            pipe("a star", callback_on_step_end=fail, **QUICK)
        assert pipe.session.prompts.bytes == 0


def test_a_pipeline_is_warm_for_prompts_it_has_not_seen(tiny_sd15_bundle: Path, runs: list[str]) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        pipe.warm_up([(64, 64)], pictures=False, num_inference_steps=2)
    assert runs.count("text_encoder") == 2


def test_warming_up_empties_it_while_nobody_else_can_read_it(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear, free = PromptCache.clear, list[bool]()

    def seen(cache: PromptCache) -> None:
        def taken() -> bool:
            return pipe.backend.lock.acquire(blocking=False) and not pipe.backend.lock.release()

        with ThreadPoolExecutor(1) as another:
            free.append(another.submit(taken).result(60))
        clear(cache)

    monkeypatch.setattr(PromptCache, "clear", seen)
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        pipe.warm_up([(32, 32)], pictures=False, num_inference_steps=1)
    assert free and not any(free)
