"""Ten thousand manifests, scheduler configs and requests with odd values: a result, or one clear error of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import BundleError, LatentRTError, RequestError, SchedulerError
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sampling.catalog import SAMPLERS
from PIL import Image

from .changes import ODD, changed, no_longer_than
from .watching import only_in

pytestmark = pytest.mark.slow

MANIFEST: dict[str, Any] = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


def one_line(error: LatentRTError) -> None:
    assert str(error).isprintable() and 0 < len(str(error)) < 2000, repr(error)


def refused(what: object, use: Callable[[], object], *kinds: type[LatentRTError]) -> bool:
    """Tell whether something was refused; any error that is none of `kinds`, or no line, fails the test."""
    with no_longer_than(60, what):
        try:
            use()
        except kinds as error:
            one_line(error)
            return True
        except Exception as error:
            raise AssertionError(f"{error!r} of {str(what)[:3000]}") from error
    return False


def test_changed_manifests(tmp_path: Path) -> None:
    generator, refusals = random.Random(1), 0

    def use() -> None:
        bundle = Bundle.open(tmp_path)
        for graph in bundle.manifest.graphs:
            bundle.digest(bundle.graph(graph.name))
        bundle.problems()

    for _ in range(2500):
        manifest = changed(MANIFEST, generator)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with only_in(tmp_path):
            refusals += refused(manifest, use, BundleError)
    assert 1200 < refusals < 2500


def test_bundles_of_changed_manifests_draw_or_say_why(tmp_path: Path) -> None:
    """What a manifest's checks let through must not come out of the runtime as anything but an error of ours."""
    generator, refusals, folder = random.Random(2), 0, tmp_path / "bundle"
    folder.mkdir()
    for file in BUNDLE.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    cache = EngineCache(tmp_path / "engines")

    def use() -> None:
        with Pipeline.open(folder, "onnxruntime-cpu", threads=1, cache=cache) as pipe:
            pipe("a", seed=1, num_inference_steps=1, width=64, height=64)

    few = {key: value for key, value in MANIFEST.items() if key not in ("source", "tools", "files")}
    for _ in range(60):
        manifest = {**MANIFEST, **changed(few, generator)}
        try:
            text = json.dumps(manifest)
            (folder / "manifest.json").write_text(text, encoding="utf-8")
            Bundle.open(folder)
        except LatentRTError:
            continue
        with only_in(tmp_path):
            refusals += refused(manifest, use, LatentRTError)
    assert refusals > 2


def test_changed_scheduler_configs() -> None:
    generator, refusals = random.Random(3), 0
    for _ in range(5500):
        name = generator.choice(sorted(SAMPLERS))
        config = changed({**SAMPLERS[name].defaults, "_class_name": name}, generator)
        steps = generator.choice((1, 2, 3, 4, 7, 20))

        def use(config: Any = config, steps: int = steps) -> None:
            table = step_table(config, steps)
            assert np.isfinite(table.weights).all() and np.isfinite(table.timesteps).all()

        refusals += refused(config, use, SchedulerError, RequestError)
    assert 1000 < refusals < 5500


PICTURE = np.zeros((64, 64, 3), np.uint8)
VALUES: dict[str, list[Any]] = {
    "prompt": ["a", "", "猫" * 300, ["a", "b"], ("a",), " \n\t", "a" * 5000],
    "negative_prompt": [None, "b", ["c", "d"], ["c"]],
    "height": [None, 64, 32, 40, 8, 63],
    "width": [None, 64, 32, 8, 72, 63],
    "num_inference_steps": [1, 2, 3],
    "guidance_scale": [None, 0, 1, 1.0001, 7.5, 1000, 1001],
    "num_images_per_prompt": [1, 2],
    "seed": [0, 1, 2**64 - 1, None, 2**64],
    "sampler": [None, "ddim", "euler_a", "dpmpp_2m_karras", "unipc", "lcm", "nothing", "DDIMScheduler"],
    "eta": [0.0, 0.5, 1, 1.1],
    "image": [None, PICTURE, PICTURE[None], PICTURE / 255, PICTURE[..., 0], Image.new("LA", (40, 64)), "missing.png"],
    "mask_image": [None, PICTURE[..., 0], Image.new("1", (64, 64), 1), PICTURE.astype(bool)],
    "strength": [None, 1, 0.5, 1e-9, 0, 2],
    "output_type": ["pil", "np", "latent", "jpeg"],
    "keep_images": [True, False],
}
SMALL = [value for value in ODD if not (isinstance(value, int | float) and value > 3)]
"""Odd values that no request is long for."""


def test_changed_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator, refusals = random.Random(4), 0
    cache = EngineCache(tmp_path / "engines")
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, cache=cache) as pipe:
        expected = np.asarray(pipe("a", seed=1, num_inference_steps=2, width=64, height=64).images[0])
        for number in range(2000):
            request: dict[str, Any] = {"prompt": "a", "width": 32, "height": 32, "num_inference_steps": 1}
            for name in generator.sample(sorted(VALUES), generator.randint(0, 6)):
                request[name] = generator.choice(VALUES[name])
            if number % 2:
                name = generator.choice(sorted(set(VALUES) - {"keep_images"}))
                request[name] = generator.choice(SMALL if name != "seed" else ODD)
            if request.get("height") is None or request.get("width") is None:
                request["num_inference_steps"] = 1  # the bundle's own size takes longer

            def use(request: dict[str, Any] = request) -> None:
                result = pipe(**request)
                assert np.isfinite(np.asarray(result.images[0] if len(result.images) else 0.0)).all()

            with only_in(tmp_path / "engines"):
                refusals += refused(request, use, RequestError)
        assert 800 < refusals < 1800
        again = pipe("a", seed=1, num_inference_steps=2, width=64, height=64).images[0]
        assert np.array_equal(np.asarray(again), expected)
