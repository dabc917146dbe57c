"""A backend whose engines are for fixed shapes: TensorRT on a simulated GPU, as a service would use it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, GuidanceInfo, SkippedLayers
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, MissingPlanError, RequestError, SchedulerError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt.backend import TensorRt
from latentrt.engines.tensorrt.step import FREE
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.queue import MAX_POOLS
from latentrt.runtime.batches import Batches
from latentrt.runtime.cli import run
from latentrt.runtime.loop.decoding import NO_WHOLE
from latentrt.runtime.loop.forecast import METHODS, folded, forecast_named
from latentrt.runtime.loop.inputs import blank_arrays
from latentrt.runtime.loop.wiring import wired_shapes
from latentrt.runtime.request import GenerationRequest
from latentrt.runtime.sampling import names, step_table
from latentrt.runtime.sampling.catalog import SAMPLERS
from latentrt.runtime.sampling.step_table import StepTable
from latentrt.runtime.warm_up import guided_requests
from PIL import Image

from ..engines import simulated_backends
from ..engines.simulated_backends import tensorrt_backend
from ..engines.simulated_codes import CUresult, Failure
from ..engines.simulated_cuda import SimulatedDriver

QUICK: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
PICTURE = Image.new("RGB", (32, 32), "red")
STEPS = (1, 20, 64)


@pytest.fixture(autouse=True)
def engines_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check of new engines, which has tests of its own and takes its time."""
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver()


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("plans"))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, shared_cache: EngineCache, driver: SimulatedDriver) -> TensorRt:
    return tensorrt_backend(monkeypatch, shared_cache, driver)


@pytest.fixture
def pipe(tiny_sd15_bundle: Path, backend: TensorRt) -> Iterator[Pipeline]:
    with Pipeline(Bundle.open(tiny_sd15_bundle), backend, max_batch=2) as opened:
        yield opened


def draw(pipe: Pipeline, prompt: Any = "a", **arguments: Any) -> Any:
    return pipe(prompt, output_type="np", **{**QUICK, "seed": 1, **arguments}).images


def loaded(backend: TensorRt) -> Counter[str]:
    return Counter(plan.facts["graph"] for plan in (each.plan for each in backend._loaded.values()))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    return tmp_path


def command_line(monkeypatch: pytest.MonkeyPatch, **options: Any) -> TensorRt:
    """Return a backend that shares its cache with the command line, on which it works too."""
    return tensorrt_backend(monkeypatch, EngineCache(), **options)


def table_of(scheduler: Mapping[str, Any], steps: int, *, sampler: str, strength: float = 1.0) -> StepTable:
    """Return a sampler's table for a config, or for its own where that is for other models, at most for 50 steps."""
    try:
        return step_table(scheduler, steps, sampler=sampler, strength=strength)
    except RequestError:
        return step_table(scheduler, 50, sampler=sampler, strength=strength)
    except SchedulerError:
        return step_table({"_class_name": sampler}, max(steps, 2), strength=strength)


@pytest.mark.usefixtures("home")
def test_what_is_built_serves_every_sampler_number_of_steps_and_guidance(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, bundle = command_line(monkeypatch, build=False), Bundle.open(tiny_sd15_bundle)
    sizes, batches = [(32, 32), (64, 32)], [1, 3]
    arguments = [f"--size={width}x{height}" for width, height in sizes] + [f"--batch={batch}" for batch in batches]
    assert run(["build", str(tiny_sd15_bundle), "--backend", "tensorrt", *arguments]) == 0
    built = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in built) == len(sizes) * len(batches)
    scheduler, seen = bundle.manifest.scheduler, set()
    for sampler in (*names(), *SAMPLERS):
        for steps, strength in [(steps, 1.0) for steps in STEPS] + [(64, 0.5)]:  # from a picture, with a mask or not
            table = table_of(scheduler, steps, sampler=sampler, strength=strength)
            for (width, height), batch, guidance in product(sizes, batches, (1.0, 7.5)):
                request = GenerationRequest(prompt=("",), width=width, height=height, guidance_scale=guidance)
                arrays = Batches.blank(bundle, request, table, batch)
                shape = tuple((name, array.shape) for each in arrays for name, array in each.items())
                if shape not in seen:
                    seen.add(shape)
                    shapes = wired_shapes(bundle, *arrays)
                    backend.prepare(bundle, {**shapes, "image_encoder": {"image": (1, height, width, 3)}})
    assert len(seen) > 100
    with pytest.raises(MissingPlanError, match="--size 32x64 --batch 1`"):
        other = GenerationRequest(prompt=("",), width=32, height=64)
        backend.prepare(bundle, wired_shapes(bundle, *Batches.blank(bundle, other, table, 1)))


def test_every_sampler_lies_inside_the_range_of_step_plans(tiny_sd15_bundle: Path) -> None:
    """Also those whose options a checkpoint raises, and forecasts, which remember more."""
    scheduler = Bundle.open(tiny_sd15_bundle).manifest.scheduler
    most = {name: high for name, (_, _, high) in FREE.items()}
    history = []
    for name, sampler in SAMPLERS.items():
        orders = {key: max(sampler.choices[key]) for key in sampler.choices if key.endswith("_order")}
        for options in ({}, orders, {"skip_prk_steps": False}, {"skip_prk_steps": True}):
            table = table_of({**scheduler, **options}, 40, sampler=name)
            arrays = blank_arrays(table, 4, (4, 2, 2), mix=(-1.0, 2.0), network_dtype=np.float32)
            history.append(arrays["weights"].shape[1] - 1)
            assert history[-1] <= most["H"], name
            longest = 1000 // 40  # a thousand steps are the most that a checkpoint was trained for
            assert len(arrays["weights"]) * longest <= most["T"] and table.draw_count * longest <= most["D"], name
            for forecast in map(forecast_named, METHODS):
                with suppress(RequestError):  # samplers that draw noise, or clip
                    history.append(folded(table, forecast).history)
    assert max(history) == most["H"]


def test_what_no_step_plan_takes_is_one_clear_line(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FREE, "D", (1, 1, 32))  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="the step takes 48 of at most 32 noise tensors of an image: give fewer"):
        draw(pipe, sampler="euler_a", num_inference_steps=40)
    assert draw(pipe, sampler="euler_a", num_inference_steps=20).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("default", "request_"),
    [
        (7.5, {"width": 64}),
        (7.5, {"prompt": ["a", "b"], "guidance_scale": 1.0, "image": PICTURE}),
        (1.0, {"guidance_scale": 7.5}),
        (7.5, {"prompt": "a BREAK cat", "prompt_syntax": "a1111"}),
    ],
    ids=str,
)
def test_the_command_in_an_error_makes_the_request_work(
    tiny_sd15_bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch, default: float, request_: dict[str, Any]
) -> None:
    folder = home / "a bundle"
    shutil.copytree(tiny_sd15_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "default_guidance_scale": default}))
    backend = command_line(monkeypatch, build=False)
    with Pipeline(Bundle.open(folder), backend, max_batch=2) as pipe:
        with pytest.raises(EngineError) as missing:
            draw(pipe, **request_)
        command = re.search(r"Build it with `latentrt (.*)`", str(missing.value))
        assert command and "\n" not in str(missing.value)
        assert run(shlex.split(command[1])) == 0
        assert np.isfinite(draw(pipe, **request_)).all()


def test_engines_that_no_kept_shape_uses_are_closed(pipe: Pipeline, backend: TensorRt) -> None:
    for width in range(32, 32 + 8 * 6, 8):
        draw(pipe, width=width, num_inference_steps=1, sampler="euler")
    few = ("denoiser", "decoder", "step")
    assert {graph: loaded(backend)[graph] for graph in few} == dict.fromkeys(few, 4)
    assert loaded(backend)["text_encoder"] == 1  # one for every size
    pipe.decode(np.zeros((1, 4, 3, 3), np.float32))
    pipe.decode(np.zeros((1, 4, 5, 3), np.float32))
    assert loaded(backend)["decoder"] == 5  # of sizes that no workspace has, the last one


def test_engines_of_sizes_that_left_a_batcher_are_closed(pipe: Pipeline, backend: TensorRt) -> None:
    with Batcher(pipe, slots=1) as batcher:
        for width in range(32, 32 + 8 * (MAX_POOLS + 2), 8):
            batcher.submit(f"width {width}", **{**QUICK, "width": width}).result(120)
        few = ("denoiser", "decoder", "step")
        assert {graph: loaded(backend)[graph] for graph in few} == dict.fromkeys(few, MAX_POOLS)
        assert loaded(backend)["text_encoder"] == 1
    assert not loaded(backend)


def test_a_shape_that_shares_an_engine_with_the_one_it_replaces_does_not_open_it_again(
    pipe: Pipeline, backend: TensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.session.kept = 1
    draw(pipe, sampler="euler")
    denoiser = next(each for each in backend._loaded.values() if each.plan.facts["graph"] == "denoiser")
    draw(pipe, sampler="euler_a")
    assert denoiser in backend._loaded.values() and loaded(backend)["denoiser"] == 1


def test_memory_over_the_budget_lets_go_of_the_oldest_shape(
    tiny_sd15_bundle: Path, backend: TensorRt, driver: SimulatedDriver
) -> None:
    bundle = Bundle.open(tiny_sd15_bundle)
    with Pipeline(bundle, backend) as pipe:
        draw(pipe)
        one = backend.device.bytes_taken()
    with Pipeline(bundle, backend, memory_budget=one + one // 2) as pipe:
        expected = draw(pipe)
        draw(pipe, width=40)
        assert len(pipe.session._workspaces) == 1 and loaded(backend)["denoiser"] == 1
        assert np.array_equal(draw(pipe), expected)
    with pytest.raises(RequestError, match="memory_budget is 0"):
        Pipeline(bundle, backend, memory_budget=0)


def test_the_last_batch_runs_at_the_size_of_those_before_it(pipe: Pipeline, backend: TensorRt) -> None:
    prompts, seen, handed = ["a", "b", "c"], [], []

    def look(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert len(pipe.decode(values["latents"])) == len(values["latents"])
        seen.append(len(values["latents"]))
        return values

    both = draw(pipe, ["c", "c"], seed=3)
    result = pipe(
        prompts,
        seed=1,
        output_type="np",
        callback_on_step_end=look,
        on_batch=lambda _, first, images: handed.append((first, len(images))),
        **QUICK,
    )
    assert seen == [2, 2, 2, 1, 1, 1] and handed == [(0, 2), (2, 1)]
    assert result.seeds == [1, 2, 3] and len(result.images) == 3
    assert np.array_equal(result.images[2], both[0])
    assert len(pipe.session._workspaces) == 1 and loaded(backend)["denoiser"] == 1
    latents = pipe(prompts, seed=1, output_type="latent", **QUICK).images
    assert latents.shape == (3, 4, *latents.shape[2:])
    alone = draw(pipe, "c", seed=3)  # a request of its own gets a shape of its own, and later last batches use it
    assert np.abs(alone[0] - result.images[2]).max() < 1e-5 and len(pipe.session._workspaces) == 2
    assert np.array_equal(draw(pipe, prompts)[2], alone[0])


def test_where_building_is_forbidden_a_batch_runs_at_the_next_size_that_is_built(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, bundle = EngineCache(tmp_path), Bundle.open(tiny_sd15_bundle)
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache)) as pipe:
        expected = draw(pipe, ["a", "b", "c"])
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache, build=False)) as pipe:
        assert np.array_equal(draw(pipe, ["a", "b"]), expected[:2])
        assert len(pipe.session._workspaces) == 1
        with pytest.raises(MissingPlanError, match="--batch 4`"):
            draw(pipe, ["a"] * 4)
        assert len(pipe.session._workspaces) == 1


def test_a_smaller_last_batch_is_that_of_its_own_only_where_all_of_its_steps_are_there(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, bundle, part = EngineCache(tmp_path), Bundle.open(tiny_sd15_bundle), {"guidance_interval": (0.0, 0.5)}
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache), max_batch=2) as pipe:
        draw(pipe, "c")
        draw(pipe, ["a", "b"], **part)
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache, build=False), max_batch=2) as pipe:
        draw(pipe, "c")  # a shape of one picture, whose steps are all guided
        assert len(draw(pipe, ["a", "b", "c"], **part)) == 3


def test_without_a_plan_for_the_whole_picture_it_is_decoded_in_tiles_and_says_so(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, bundle, wide = EngineCache(tmp_path), Bundle.open(tiny_sd15_bundle), {"width": 320}
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache)) as pipe:
        expected = draw(pipe, tiled=True, **wide)
        assert loaded(pipe.backend)["decoder"] == 1  # type: ignore[arg-type]
        with Batcher(pipe, slots=1) as batcher:
            batcher.warm_up([(320, 32)], tiled=True)
    request = {"output_type": "np", "seed": 1, **QUICK, **wide}
    with Pipeline(bundle, tensorrt_backend(monkeypatch, cache, build=False)) as pipe:
        results = [pipe("a", **request)]
        with Batcher(pipe, slots=1, build=False) as batcher:
            results.append(batcher.submit("a", **request).result(120))
            with pytest.raises(RequestError, match=r"320x32 has no engines, .*no tensorrt plan of decoder fits"):
                batcher.submit("a", **request, tiled=False)
        for result in results:
            assert np.abs(result.images - expected).max() <= 1 / 255
            assert result.warnings == [NO_WHOLE.format(320, 32)]
        assert not pipe("a", **request, tiled=True).warnings
        with pytest.raises(MissingPlanError, match="no tensorrt plan of decoder fits"):
            pipe("a", **request, tiled=False)


def test_after_warming_up_a_request_makes_nothing_new(
    pipe: Pipeline, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            made[name] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, counted)

    for call in ("_cuMemAlloc", "_cuMemHostAlloc", "_cuStreamBeginCapture", "_cuGraphInstantiate"):
        count(driver, call)
    count(simulated_backends.Context, "__init__")
    pipe.warm_up([(32, 32), (40, 32)], [1, 2], num_inference_steps=4)
    assert min(made.values()) > 0 and len(made) == 5
    made.clear()

    def preview(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        pipe.decode(values["latents"])

    for width in (32, 40):
        for prompt in ("a", ["a", "b", "c"]):
            four = {"num_inference_steps": 4, "width": width}
            draw(pipe, prompt, **four)
            draw(pipe, prompt, **four, image=PICTURE, strength=0.5, mask_image=PICTURE, callback_on_step_end=preview)
    assert not made
    with pytest.raises(RequestError, match=r"batches has 3: give numbers from 1 to max_batch, which is 2"):
        pipe.warm_up(batches=[1, 3])


@pytest.mark.parametrize("image", [None, PICTURE], ids=["text", "image"])
def test_memory_that_ends_anywhere_leaves_nothing_behind(
    pipe: Pipeline, backend: TensorRt, driver: SimulatedDriver, monkeypatch: pytest.MonkeyPatch, image: Any
) -> None:
    def held() -> tuple[Any, ...]:
        return {name: n for name, n in driver.live.items() if n and name != "event"}, loaded(backend)

    draw(pipe, width=40)
    before, real, failures = held(), driver._cuMemAlloc, 0
    left = 0

    def scarce(nbytes: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return real(nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_cuMemAlloc", scarce, raising=False)
        while True:
            left = failures * 11
            try:
                picture = draw(pipe, image=image)
                break
            except EngineError:
                failures += 1
                assert held() == before
    assert failures > 2
    assert np.array_equal(draw(pipe, image=image), picture)


def test_a_scale_is_drawn_with_the_branches_that_are_built_for_it() -> None:
    whole = Bundle.open(BUNDLE).manifest
    flux = GuidanceInfo(scale="true_cfg_scale", needs_negative=True)
    skipping = GuidanceInfo(skipped=SkippedLayers(layers=(7, 8, 9)))
    for guidance, expected in ((whole.guidance, [1, 2]), (flux, [1, 2]), (skipping, [1, 2, 3])):
        manifest = whole.model_copy(update={"guidance": guidance})
        asked = [each for scale in (1.0, 4.0) for each in guided_requests(manifest, scale)]
        requests = [GenerationRequest.of(prompt="", **each).with_defaults(manifest) for each in asked]
        rows = [len(each.weights(guidance)) + bool(each.skipped_part(guidance)[0]) for each in requests]
        assert rows == expected
    with (
        Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1) as pipe,
        pytest.raises(RequestError, match="true_cfg_scale is given"),
    ):
        pipe.warm_up([(64, 64)], true_cfg_scale=4.0)


@pytest.mark.usefixtures("home")
def test_build_can_draw_once_with_each(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = command_line(monkeypatch)
    drawn: list[int] = []
    monkeypatch.setattr(
        Pipeline, "warm_up", lambda pipe, sizes, batches, **how: drawn.append(how["guidance_scale"] > 1)
    )
    build = ["build", str(tiny_sd15_bundle), "--size=32x32", "--warm"]
    assert run([*build, "--backend", "tensorrt", "--guidance", "1", "--guidance", "2"]) == 0
    assert drawn == [False, True] and backend.name == "tensorrt"
    assert run([*build, "--compute-capability", "8.6"]) == 2
    assert "--warm draws on this machine" in capsys.readouterr().err


def test_a_closed_pipeline_closes_its_stream(
    tiny_sd15_bundle: Path, backend: TensorRt, driver: SimulatedDriver
) -> None:
    before = driver.live["stream"]
    with Pipeline(Bundle.open(tiny_sd15_bundle), backend):
        assert driver.live["stream"] == before + 1
    assert driver.live["stream"] == before
