"""FLUX.1 against diffusers' own pipelines: dev, which reads a guidance scale, and schnell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import CheckpointError, RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Batcher, Pipeline
from latentrt.runtime.cli import run
from latentrt.runtime.shapes import requested_shapes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from . import tiny_flux  # noqa: E402
from .compare import check, check_refused, check_seen, mask, opened, picture  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def pipe(dev: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(dev, dev.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.flux(tmp_path_factory.mktemp("flux") / "schnell", guided=False)


def reference(kind: Any, folder: Path) -> Callable[..., Any]:
    """Return diffusers' pipeline, whose latents are two-dimensional instead of packed."""
    pipeline = opened(kind, folder)

    def draw(**request: Any) -> Any:
        result = pipeline(**request)
        if request["output_type"] == "latent":
            size = (request["height"], request["width"])
            result.images = pipeline._unpack_latents(result.images, *size, pipeline.vae_scale_factor)
        return result

    return draw


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"guidance_scale": 0.0, "height": 64, "width": 24},
        {"guidance_scale": 7.5, "height": 20, "width": 36, "num_images_per_prompt": 2},
        {"prompt": ["a star", "a blue square of glass, " * 8], "prompt_2": ["two circles", "a triangle"]},
        {"negative_prompt": "blue", "true_cfg_scale": 4.0, "num_images_per_prompt": 2},
        {"negative_prompt": "blue", "negative_prompt_2": "a star", "prompt_2": "two circles", "true_cfg_scale": 1.5},
        {"true_cfg_scale": 4.0},  # does nothing without a negative prompt
        {"negative_prompt": "blue"},  # does nothing without a scale of its own
        {"sigmas": [1.0, 0.6, 0.2]},
        {"max_sequence_length": 64, "prompt": ["a star", "a blue square of glass, " * 8]},  # cut off, with an end
        {"max_sequence_length": 128, "negative_prompt": "blue " * 200, "true_cfg_scale": 4.0},
    ],
)
def test_text_to_image(dev: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, reference(diffusers.FluxPipeline, dev), **{**QUICK, **request_})


@pytest.mark.parametrize(
    "request_",
    [
        {"strength": 0.7},
        {"num_inference_steps": 6, "guidance_scale": 7.0},  # the default strength
        {"strength": 0.5, "num_inference_steps": 5, "height": 20, "width": 36},
        {"strength": 1.0, "negative_prompt": "blue", "true_cfg_scale": 2.0},
    ],
)
def test_image_to_image(dev: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    request = {**QUICK, "guidance_scale": 3.0, **request_}
    image = picture(request["width"], request["height"])
    check(pipe, reference(diffusers.FluxImg2ImgPipeline, dev), image=image, **request)


@pytest.mark.parametrize(
    "request_",
    [
        {"num_inference_steps": 5},  # the default strength
        {"strength": 1.0},
        {"strength": 0.8, "negative_prompt": "blue", "true_cfg_scale": 2.0, "height": 20, "width": 36},
    ],
)
def test_inpainting(dev: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    request = {**QUICK, "guidance_scale": 3.0, **request_}
    size = (request["width"], request["height"])
    check(pipe, reference(diffusers.FluxInpaintPipeline, dev), image=picture(*size), mask_image=mask(*size), **request)


def test_each_picture_of_a_batch_is_that_of_its_seed(dev: Path, pipe: Pipeline) -> None:
    """Given several generators, diffusers draws the initial picture's latents from the first alone."""
    kind, request = reference(diffusers.FluxInpaintPipeline, dev), {**QUICK, "strength": 0.8, "guidance_scale": 3.0}
    given = {"image": picture(32, 32), "mask_image": mask(32, 32), "output_type": "np", **request}
    ours = pipe(**given, seed=5, num_images_per_prompt=2).images
    for image, seed in zip(ours, (5, 6), strict=True):
        wanted = kind(**given, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.abs(image - wanted).max() * 255 <= 2


def test_prompt_and_guidance_are_seen(pipe: Pipeline) -> None:
    request = {**QUICK, "negative_prompt": "blue", "true_cfg_scale": 2.0}
    changes = ({"prompt": "a star"}, {"prompt_2": "a star"}, {"negative_prompt_2": "x"}, {"guidance_scale": 9.0})
    check_seen(pipe, request, *changes)


def test_the_defaults_are_those_of_diffusers(dev: Path, pipe: Pipeline) -> None:
    manifest, latent = pipe.bundle.manifest, pipe.bundle.manifest.latent
    assert (manifest.default_guidance_scale, manifest.default_num_inference_steps) == (3.5, 28)
    assert (latent.default_height, latent.size_multiple, latent.channels) == (256, 4, 16)
    assert [info.max_length for info in manifest.tokenizers] == [77, 512]


def test_rows_of_other_lengths_than_there_are_are_refused(pipe: Pipeline) -> None:
    for length, message in ((513, "this bundle takes 512 at most"), (0, "greater than or equal to 1")):
        with pytest.raises(RequestError, match=message):
            pipe(**QUICK, max_sequence_length=length)
    rows = np.zeros((1, 64, 32), np.float32)
    given = {"prompt_embeds": rows, "pooled_prompt_embeds": rows[:, 0], "negative_prompt": "x", "true_cfg_scale": 2.0}
    with pytest.raises(RequestError, match="max_sequence_length is 8192: this bundle takes 512 at most"):
        pipe(**given, max_sequence_length=8192)
    shapes = requested_shapes(pipe.bundle, 32, 32, 1, prompt_tokens=256)
    assert shapes["text_encoder"]["token_ids_2"] == (1, 256) and shapes["denoiser"]["context"] == (1, 256, 32)


def test_a_negative_prompt_is_encoded_as_long_as_embeddings_are(pipe: Pipeline) -> None:
    rows = np.zeros((1, 64, 32), np.float32)
    given = {"prompt_embeds": rows, "pooled_prompt_embeds": rows[:, 0], "negative_prompt": "x", "true_cfg_scale": 2.0}
    request = {"height": 32, "width": 32, "num_inference_steps": 1, **given}
    with pytest.raises(RequestError, match="of the same length"):
        pipe(**request)
    assert pipe(**request, max_sequence_length=64).images[0].size == (32, 32)


def test_embeddings_stand_in_place_of_prompts(dev: Path, pipe: Pipeline) -> None:
    """They may have other lengths than a prompt has."""
    kind = opened(diffusers.FluxPipeline, dev)
    embeds, pooled, _ = kind.encode_prompt("a star", max_sequence_length=64)
    request = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **request}
    wanted = kind(**given, generator=torch.Generator().manual_seed(5)).images
    assert np.abs(np.asarray(pipe(**given, seed=5).images) - wanted).max() * 255 <= 2


@pytest.mark.parametrize(
    ("texts", "encoded"),
    [
        ({"prompt": "a star"}, {"negative_": "blue"}),
        ({"prompt": "a star", "prompt_2": "two circles"}, {"negative_": "blue"}),
        ({}, {"": "a star", "negative_": "blue"}),
        ({"negative_prompt": "blue", "negative_prompt_2": "a triangle"}, {"": "a star"}),
    ],
)
def test_either_side_may_be_embeddings(
    dev: Path, pipe: Pipeline, texts: dict[str, str], encoded: dict[str, str]
) -> None:
    """As in diffusers, those of a negative prompt guide, and what each tokenizer reads of the other side is its own."""
    kind, given = opened(diffusers.FluxPipeline, dev), dict[str, Any](texts)
    for side, text in encoded.items():
        given[f"{side}prompt_embeds"], given[f"{side}pooled_prompt_embeds"], _ = kind.encode_prompt(text)
    given |= {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 4.0, "output_type": "np"}
    wanted = kind(**given, generator=torch.Generator().manual_seed(5)).images
    ours = pipe(**given, seed=5)
    assert np.abs(np.asarray(ours.images) - wanted).max() * 255 <= 2 and not ours.warnings
    with Batcher(pipe, slots=1) as batcher:
        found = batcher.submit(**given, seed=5).result(300).images
    assert np.abs(np.asarray(found) - wanted).max() * 255 <= 2


def test_texts_beside_embeddings_of_their_side_are_refused(pipe: Pipeline) -> None:
    rows = np.zeros((1, 64, 32), np.float32)
    for side in ("", "negative_"):
        given: dict[str, Any] = {f"{side}prompt_embeds": rows, f"{side}pooled_prompt_embeds": rows[:, 0]}
        given |= {f"{side}prompt_2": "a star"} if side == "" else {"prompt": "a star", f"{side}prompt_2": "blue"}
        with pytest.raises(RequestError, match=f"^{side}prompt_2 and {side}prompt_embeds are given: give one of them"):
            pipe(**given)


@pytest.mark.slow
def test_schnell_reads_no_guidance_scale(schnell: Path, tmp_path: Path) -> None:
    with Pipeline.open(export_checkpoint(schnell, tmp_path / "bundle"), "onnxruntime-cpu") as pipe:
        manifest = pipe.bundle.manifest
        assert (manifest.default_guidance_scale, manifest.default_num_inference_steps, manifest.inputs) == (0.0, 4, ())
        for request in ({}, {"guidance_scale": 0.0, "height": 48, "negative_prompt": "x", "true_cfg_scale": 2.0}):
            check(pipe, reference(diffusers.FluxPipeline, schnell), **{**QUICK, **request})


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        (
            "transformer/config.json",
            '"in_channels": 64',
            '"in_channels": 384',
            UnsupportedModelError,
            "takes 384 and gives 384",
        ),
        (
            "transformer/config.json",
            '"joint_attention_dim": 32',
            '"joint_attention_dim": 64',
            CheckpointError,
            "text_encoder_2",
        ),
        ("transformer/config.json", '"num_layers": 2', '"num_layers": 100000', CheckpointError, "num_layers is 100000"),
        (
            "model_index.json",
            '"T5EncoderModel"',
            '"UMT5EncoderModel"',
            UnsupportedModelError,
            "only T5EncoderModel is supported",
        ),
        (
            "model_index.json",
            '"FluxPipeline"',
            '"FluxFillPipeline"',
            UnsupportedModelError,
            "'FluxFillPipeline' is not supported",
        ),
    ],
)
def test_other_checkpoints_are_refused_in_a_line(
    schnell: Path, tmp_path: Path, file: str, old: str, new: str, error: type[Exception], message: str
) -> None:
    check_refused(schnell, tmp_path / "other", file, old, new, error, message)


def test_build_draws_both_kinds_of_guidance_that_it_builds(
    pipe: Pipeline, branches_asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    build = ["build", str(pipe.bundle.path), "--backend", "onnxruntime-cpu", "--size", "32x32", "--warm"]
    assert run([*build, "--guidance", "4"]) == 0 and set(branches_asked) == {2}
    branches_asked.clear()
    assert run([*build, "--guidance", "1"]) == 0 and set(branches_asked) == {1}
