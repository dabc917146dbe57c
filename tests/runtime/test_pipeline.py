"""The pipeline's own contract: batching, seeds, outputs, callbacks, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import BackendUnavailableError, EngineError, RequestError, ShapeError
from latentrt.engines.host import HostDevice, HostTensor
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.runtime import Batcher, Bundle, Pipeline, Timings, batches
from latentrt.runtime.loop.denoise import CapturedWork, Mode
from latentrt.runtime.pictures.png import TEXT_KEY
from PIL import Image

PROMPTS = ["a red circle on a blue background", "a small star", "two rings"]
QUICK: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        yield pipe


def generate(pipe: Pipeline, prompt: Any = PROMPTS[0], **arguments: Any) -> np.ndarray:
    images = pipe(prompt, output_type="np", **{**QUICK, **arguments}).images
    assert isinstance(images, np.ndarray)
    return images


def test_outputs_have_the_fields_types_and_shapes(pipe: Pipeline) -> None:
    pil = pipe(PROMPTS, seed=0, **QUICK)
    assert [image.size for image in pil.images] == [(64, 64)] * 3 and pil.images[0].mode == "RGB"
    floats = pipe(PROMPTS, seed=0, output_type="np", **QUICK).images
    assert floats.shape == (3, 64, 64, 3) and floats.dtype == np.float32
    assert floats.min() >= 0 and floats.max() <= 1
    assert np.abs(np.stack([np.asarray(image) for image in pil.images]) - floats * 255).max() <= 0.501
    latents = pipe(PROMPTS, seed=0, output_type="latent", **QUICK).images
    assert latents.dtype == np.float32 and latents.ndim == 4 and latents.shape[:2] == (3, 4)


def test_a_picture_does_not_depend_on_its_neighbours(pipe: Pipeline) -> None:
    together = generate(pipe, PROMPTS, seed=5)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(pipe, prompt, seed=5 + index)
        assert np.abs(alone[0] - together[index]).max() <= 1 / 255


@pytest.mark.parametrize("sampler", ["euler_a", "ddim"])
def test_batches_larger_than_the_limit_are_split(tiny_sd15_bundle: Path, pipe: Pipeline, sampler: str) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=2) as small:
        split = generate(small, PROMPTS, seed=9, sampler=sampler, num_images_per_prompt=1)
    assert np.abs(split - generate(pipe, PROMPTS, seed=9, sampler=sampler)).max() <= 1 / 255


def test_image_i_uses_seed_plus_i_and_reports_it(pipe: Pipeline) -> None:
    result = pipe(PROMPTS[:2], num_images_per_prompt=2, seed=2**64 - 2, output_type="np", **QUICK)
    assert result.seeds == [2**64 - 2, 2**64 - 1, 0, 1]
    assert np.abs(result.images[3] - generate(pipe, PROMPTS[1], seed=1)[0]).max() <= 1 / 255


def test_without_a_seed_pictures_differ_and_can_be_made_again(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPTS[0], output_type="np", **QUICK) for _ in range(2))
    assert first.seeds != second.seeds
    assert np.array_equal(generate(pipe, seed=first.seeds[0]), first.images)


def test_each_prompt_may_have_its_own_negative_prompt(pipe: Pipeline) -> None:
    both = pipe(PROMPTS[:2], ["blurry", "dark"], seed=1, output_type="np", **QUICK).images
    second = pipe(PROMPTS[1], "dark", seed=2, output_type="np", **QUICK).images
    assert np.abs(both[1] - second[0]).max() <= 1 / 255
    assert np.abs(both[1] - generate(pipe, PROMPTS[1], seed=2)[0]).max() > 0


def test_guidance_of_one_ignores_the_negative_prompt(pipe: Pipeline) -> None:
    with_negative = pipe(PROMPTS[0], "blurry", seed=1, output_type="np", **{**QUICK, "guidance_scale": 1.0}).images
    assert np.array_equal(with_negative, generate(pipe, seed=1, guidance_scale=1.0))


@pytest.mark.parametrize("mode", ["step", "loop", "request"])
def test_captured_and_eager_requests_agree_bit_for_bit(tiny_sd15_bundle: Path, mode: Mode) -> None:
    requests: list[dict[str, Any]] = [
        {"seed": 3, "sampler": "ddim"},
        {"seed": 4, "sampler": "ddim", "prompt": PROMPTS[1], "guidance_scale": 9.0},
        {"seed": 3, "sampler": "pndm", "num_inference_steps": 4},
        {"seed": 3, "sampler": "euler_a"},
        {"seed": 3, "sampler": "ddim"},
    ]
    with (
        Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, mode="eager") as eager,
        Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, mode=mode) as captured,
    ):
        for request in requests:
            assert np.array_equal(generate(eager, **request), generate(captured, **request)), request


def test_a_request_leaves_no_trace_in_the_next(pipe: Pipeline) -> None:
    first = generate(pipe, seed=1, sampler="pndm", num_inference_steps=5)
    generate(pipe, PROMPTS[1], seed=2, sampler="unipc", num_inference_steps=7, guidance_scale=9.0)
    generate(pipe, PROMPTS[2], seed=3, sampler="pndm", num_inference_steps=4)
    assert np.array_equal(generate(pipe, seed=1, sampler="pndm", num_inference_steps=5), first)


def test_what_a_request_leaves_out_is_the_bundle_s_own(pipe: Pipeline) -> None:
    own = {"default_num_inference_steps": 2, "default_guidance_scale": 3.0}
    latent = pipe.bundle.manifest.latent.model_copy(update={"default_width": 96, "default_height": 64})
    manifest = pipe.bundle.manifest.model_copy(update={**own, "latent": latent})
    with Pipeline(Bundle(pipe.bundle.path, manifest), pipe.backend) as changed:
        result = changed(PROMPTS[0], seed=1)
    assert result.images[0].size == (96, 64)
    told = pipe(PROMPTS[0], seed=1, num_inference_steps=2, guidance_scale=3.0, width=96, height=64)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(told.images[0]))
    assert result.request == told.request


def test_sizes_other_than_the_default_and_not_square(pipe: Pipeline) -> None:
    assert generate(pipe, seed=1, height=64, width=128).shape == (1, 64, 128, 3)


def test_the_mask_keeps_what_it_does_not_cover(pipe: Pipeline) -> None:
    y, x = np.mgrid[:64, :64] * 4
    picture = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    arguments: dict[str, Any] = {"image": picture, "seed": 4, "output_type": "latent"}
    kept = pipe(PROMPTS[0], mask_image=mask, **QUICK, **arguments).images
    nothing = pipe(PROMPTS[0], mask_image=np.zeros_like(mask), **QUICK, **arguments).images
    rows = kept.shape[2] // 2
    assert np.array_equal(kept[:, :, rows:], nothing[:, :, rows:])
    assert np.abs(kept[:, :, :rows] - nothing[:, :, :rows]).max() > 0.1


def test_the_size_of_an_initial_picture_is_the_default(pipe: Pipeline) -> None:
    picture = Image.new("RGB", (130, 70), "red")
    result = pipe(PROMPTS[0], image=picture, strength=0.5, seed=0, num_inference_steps=2)
    multiple = pipe.bundle.manifest.latent.size_multiple
    assert result.images[0].size == (130 // multiple * multiple, 70 // multiple * multiple)


def test_callback_sees_every_step_and_may_replace_latents(pipe: Pipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep))
        return values

    plain = generate(pipe, seed=6)
    watched = generate(pipe, seed=6, callback_on_step_end=watch)
    assert [step for step, _ in seen] == [0, 1, 2] and [t for _, t in seen] == sorted(
        (t for _, t in seen), reverse=True
    )
    assert np.abs(watched - plain).max() <= 1 / 255

    def erase(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(values["latents"])}

    assert np.abs(generate(pipe, seed=6, callback_on_step_end=erase) - plain).max() > 1 / 255
    assert np.array_equal(generate(pipe, seed=6), plain)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim"])
def test_latents_that_a_callback_gives_back_go_on_as_they_are(pipe: Pipeline, sampler: str) -> None:
    """Those of Euler are scaled before the network sees them."""
    plain = generate(pipe, seed=6, sampler=sampler)
    given_back = generate(pipe, seed=6, sampler=sampler, callback_on_step_end=lambda *given: given[-1])
    assert np.abs(given_back - plain).max() <= 1e-4


def test_an_exception_in_the_callback_cancels_and_the_pipeline_lives_on(pipe: Pipeline) -> None:
    def cancel(*_: Any) -> None:
        raise KeyboardInterrupt

    plain = generate(pipe, seed=6)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, seed=6, callback_on_step_end=cancel)
    assert np.array_equal(generate(pipe, seed=6), plain)


def test_a_cancelled_request_in_low_memory_leaves_nothing_open(tiny_sd15_bundle: Path, pipe: Pipeline) -> None:
    def cancel(*_: Any) -> None:
        raise KeyboardInterrupt

    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, low_memory=True) as low:
        with pytest.raises(KeyboardInterrupt):
            generate(low, seed=6, callback_on_step_end=cancel)
        assert low.session.open_graphs == set()
        generate(low, seed=6, width=128)
        assert np.array_equal(generate(low, seed=6), generate(pipe, seed=6))


def test_work_that_failed_the_first_time_is_not_taken_for_done() -> None:
    stream, done = HostDevice().stream(), []

    def work(stream: Any) -> None:
        done.append(len(done))
        if len(done) == 1:
            raise EngineError("out of memory")

    captured = CapturedWork()
    with pytest.raises(EngineError):
        captured.run("key", work, stream)
    captured.run("key", work, stream)
    assert done == [0, 1] and captured._graphs == {"key": None}


def test_latents_replaced_after_the_last_step_are_decoded(pipe: Pipeline) -> None:
    def erase_last(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": np.zeros_like(values["latents"])} if step == 2 else None

    erased = pipe(PROMPTS[0], seed=6, callback_on_step_end=erase_last, **QUICK).images[0]
    latents = pipe(PROMPTS[0], seed=6, output_type="latent", **QUICK).images
    assert np.array_equal(erased, pipe.decode(np.zeros_like(latents))[0])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (5, "callback_on_step_end returned int"),
        ({"latents": [1.0]}, r"returned latents \[1\]: return finite latents of shape"),
        ({"latents": "x"}, "returned latents that numpy cannot read: return an array"),
    ],
    ids=str,
)
def test_what_a_callback_returns_wrongly_is_named(pipe: Pipeline, returned: Any, message: str) -> None:
    with pytest.raises((RequestError, ShapeError), match=message):
        generate(pipe, seed=6, callback_on_step_end=lambda *_: returned)


def test_a_callback_may_show_a_preview(pipe: Pipeline) -> None:
    shown: list[Image.Image] = []

    def show(pipe: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        shown.extend(pipe.decode(values["latents"]))

    plain = pipe(PROMPTS[0], seed=6, **QUICK).images[0]
    watched = pipe(PROMPTS[0], seed=6, callback_on_step_end=show, **QUICK).images[0]
    assert len(shown) == 3 and shown[0].size == plain.size
    assert np.abs(np.asarray(watched, int) - np.asarray(plain, int)).max() <= 1
    assert np.array_equal(shown[-1], watched) and not np.array_equal(shown[0], watched)


def test_batches_are_handed_over_before_the_next_one_starts(tiny_sd15_bundle: Path) -> None:
    order: list[tuple[str, int]] = []
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=2) as pipe:
        result = pipe(
            PROMPTS,
            seed=1,
            progress=lambda stage, done, total: order.append((stage, done)),
            on_batch=lambda request, first, images: order.append((request.images[first][0], len(images))),
            **QUICK,
        )
        steps = [("denoising", 1), ("denoising", 2), ("denoising", 3)]
        assert order == [*steps, (PROMPTS[0], 2), *steps, (PROMPTS[2], 1)]
        assert len(result.images) == 3


def test_tables_that_have_not_changed_are_not_copied_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [generate(pipe, seed=seed, guidance_scale=scale) for seed, scale in ((1, 4.0), (2, 4.0), (2, 5.0))]
    copied: list[int] = []
    write = HostTensor.write

    def noted(tensor: HostTensor, array: np.ndarray, stream: Any) -> None:
        copied.append(1)
        write(tensor, array, stream)

    generate(pipe, seed=1)
    monkeypatch.setattr(HostTensor, "write", noted)
    counts = []
    for (seed, scale), picture in zip(((1, 4.0), (2, 4.0), (2, 5.0)), plain, strict=True):
        copied.clear()
        assert np.array_equal(generate(pipe, seed=seed, guidance_scale=scale), picture)
        counts.append(len(copied))
    assert counts[0] == counts[1] == 6  # token ids, latents, history, model input, timestep, row
    assert counts[2] > 6


def test_memory_is_the_most_of_all_batches_at_the_end_of_every_stage(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=1) as pipe:
        pipe(PROMPTS[0], seed=0, **QUICK)
        taken = iter([100, 205, 300, 110, 200, 310])  # in two batches
        monkeypatch.setattr(pipe.backend.device, "bytes_taken", lambda: next(taken))
        memory = pipe(PROMPTS[:2], seed=0, **QUICK).memory
    assert memory == {"encode": 110, "denoise": 205, "decode": 310} and list(taken) == []


def test_the_memory_of_a_processor_is_what_is_resident() -> None:
    device, size = HostDevice(), 1 << 27  # so much is never what was freed before: it has pages of its own
    before = device.bytes_taken()
    tensor = device.empty((size,), np.uint8)
    tensor.write(np.ones(size, np.uint8), device.stream())
    assert device.bytes_taken() - before > size // 2  # the system may have taken other pages meanwhile
    assert device.tensor_bytes() == size
    tensor.close()


def test_memory_is_bounded_over_shapes_and_freed_at_close(tiny_sd15_bundle: Path) -> None:
    pipe = Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1)
    device = pipe.backend.device
    for width in range(64, 64 * 8, 64):
        generate(pipe, seed=0, width=width, num_inference_steps=1)
    many = device.tensor_bytes()
    generate(pipe, seed=0, width=64 * 7, num_inference_steps=1)
    assert device.tensor_bytes() == many > 0
    pipe.close()
    pipe.close()
    assert device.tensor_bytes() == 0
    with pytest.raises(EngineError, match="closed"):
        generate(pipe)
    with pytest.raises(EngineError, match="closed"):
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32))


def test_every_stage_takes_the_time_of_its_own_work(tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only work moves: a second for the text, ten for a call of the denoiser, and so on."""
    seconds = {"text_encoder": 1.0, "denoiser": 10.0, "step": 100.0, "decoder": 1000.0}
    now, run = 0.0, OnnxRuntimeEngine.run

    def work(cost: float, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += cost
            return real(*arguments, **options)

        return timed

    def running(engine: OnnxRuntimeEngine, *arguments: Any) -> None:
        work(seconds[engine.name], run)(engine, *arguments)

    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=2) as pipe:
        monkeypatch.setattr(time, "perf_counter", lambda: now)
        monkeypatch.setattr(OnnxRuntimeEngine, "run", running)
        monkeypatch.setattr(batches, "encode_prompts", work(1e4, batches.encode_prompts))
        monkeypatch.setattr(batches, "loop_arrays", work(1e5, batches.loop_arrays))
        found = pipe(PROMPTS, seed=0, **QUICK).timings
    stages = {"tokenize": 1e4, "prepare": 1e5, "encode": 1.0, "denoise": 330.0, "decode": 1000.0}
    assert found == Timings(
        **{name: 2 * cost for name, cost in stages.items()}, total=2 * sum(stages.values()), steps=6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": PROMPTS, "negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts"),
        ({"output_type": "jpeg"}, "choose pil, np or latent"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"image": np.zeros((4, 4, 4, 4))}, r"has shape \[4, 4, 4, 4\]"),
        ({"image": np.full((8, 8, 3), 7.0)}, r"outside \[0, 1\]"),
    ],
)
def test_bad_requests_name_what_is_wrong(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**{"prompt": PROMPTS[0], **arguments})


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((4, 8, 8)), r"latents is of shape \[4, 8, 8\]: give \[images, 4, h, w\]"),
        (np.zeros((1, 1, 4, 8, 8)), r"latents is of shape \[1, 1, 4, 8, 8\]"),
        (np.zeros((1, 3, 8, 8)), r"latents is of shape \[1, 3, 8, 8\]"),
        (np.zeros((0, 4, 8, 8)), r"latents is of shape \[0, 4, 8, 8\]"),
        ("x", "latents is a str that numpy cannot read: give an array"),
        ([[1], [1, 2]], "latents is a list that numpy cannot read"),
    ],
)
def test_what_is_no_latents_is_not_decoded(pipe: Pipeline, latents: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.decode(latents)


@pytest.mark.parametrize(
    ("sizes", "batches", "message"),
    [
        ([32], [1], r"sizes has 32: give \(width, height\) in pixels, such as \(512, 512\)"),
        ("32x32", [1], "sizes has '3'"),
        ([("32", 32)], [1], r"sizes has \('32', 32\)"),
        ([(32, 33)], [1], "height is 33: this bundle needs a multiple of"),
        ([(-32, 32)], [1], "width is -32"),
        (None, ["1"], "batches has '1': give numbers from 1 to max_batch"),
        (None, [1.0], "batches has 1.0"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_warmed_up_are_named(pipe: Pipeline, sizes: Any, batches: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.warm_up(sizes, batches)
    if sizes is not None:
        with Batcher(pipe, slots=1) as batcher, pytest.raises(RequestError, match=message):
            batcher.warm_up(sizes)


def test_bundles_of_few_steps_warm_up(pipe: Pipeline) -> None:
    """Their own strength leaves no step of so few."""
    own = {"default_num_inference_steps": 1, "default_strength": 0.3}
    with Pipeline(Bundle(pipe.bundle.path, pipe.bundle.manifest.model_copy(update=own)), pipe.backend) as few:
        assert few.bundle.has_graph("image_encoder")
        few.warm_up([(64, 64)])
        few.warm_up([(64, 64)], num_inference_steps=3)
        with pytest.raises(RequestError, match=r"^strength 0\.4 of 2 steps leaves no step to run"):
            few.warm_up([(64, 64)], num_inference_steps=2, strength=0.4)


def test_what_is_no_bundle_and_no_backend_is_named(pipe: Pipeline) -> None:
    given: Any = 5
    for opening in (Pipeline.open, Batcher, Bundle.open):
        with pytest.raises(
            RequestError, match=r"^bundle is 5: give the path of the folder that `latentrt export` wrote$"
        ):
            opening(given)
    with pytest.raises(RequestError, match=r"^source is 5: give a folder, a file or a hub id$"):
        Pipeline.from_pretrained(given)
    with pytest.raises(RequestError, match=r"^bundle is 5: give a Bundle, or its path to Pipeline\.open$"):
        Pipeline(given, pipe.backend)
    for backend in (None, "onnxruntime-cpu"):
        with pytest.raises(RequestError, match=f"^backend is {backend!r}: give one that is open, or its name to Pipe"):
            Pipeline(pipe.bundle, backend)  # type: ignore[arg-type]
    unnamed: Any = ["onnxruntime-cpu"]
    with pytest.raises(BackendUnavailableError, match=r"^unknown backend \['onnxruntime-cpu'\]: choose auto"):
        Pipeline.open(pipe.bundle, unnamed)


def run_alone(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_generate_imports_no_torch(tiny_sd15_bundle: Path, pipe: Pipeline, tmp_path: Path) -> None:
    code = """
import sys
from latentrt.runtime.cli import run
assert run(sys.argv[1:]) == 0
print(sorted({"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)))
"""
    output = tmp_path / "picture.png"
    arguments = ["generate", PROMPTS[0], "--bundle", str(tiny_sd15_bundle), "--steps", "2", "--seed", "3", "--json"]
    out = run_alone(code, *arguments, "-o", str(output))
    report, _, modules = out.rpartition("\n[")
    assert modules.strip() == "]"
    printed = json.loads(report)
    assert printed["images"] == [{"path": str(output), "seed": 3, "prompt": PROMPTS[0]}]
    assert printed["timings"]["steps"] >= 2
    request = json.loads(Image.open(output).text[TEXT_KEY])  # type: ignore[attr-defined]
    assert request["seed"] == 3 and request["prompt"] == PROMPTS[0] and request["num_inference_steps"] == 2
    assert request["sampler"] == printed["request"]["sampler"]


def test_importing_the_runtime_imports_no_torch() -> None:
    code = "import sys, latentrt.runtime, latentrt.runtime.pipeline, latentrt.engines, latentrt.export\n"
    code += "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert run_alone(code).strip() == "[]"


def test_low_memory_gives_the_same_picture_with_fewer_engines_open(tiny_sd15_bundle: Path, pipe: Pipeline) -> None:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, low_memory=True) as low:
        opened: list[set[str]] = []

        def look(low: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
            opened.append(low.session.open_graphs)

        for seed in (1, 2):
            assert np.array_equal(generate(low, seed=seed, callback_on_step_end=look), generate(pipe, seed=seed))
        assert opened == [{"denoiser", "step"}] * 6
        assert low.session.open_graphs == set()
