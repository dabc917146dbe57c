"""Stable Diffusion 3 and 3.5 against diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import CheckpointError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.diffusers_folder import open_folder  # noqa: E402
from latentrt.export.families.stable_diffusion_3 import FAMILY  # noqa: E402

from . import tiny_transformers  # noqa: E402
from .compare import RELATIVE, check, mask, opened, picture  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3}
LONG = "a photo of a star, a square and a triangle, " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.sd3(tmp_path_factory.mktemp("sd3") / "base")


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(checkpoint, checkpoint.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pipeline]]:
    folder = tiny_transformers.sd35(tmp_path_factory.mktemp("sd35") / "base")
    with Pipeline.open(export_checkpoint(folder, folder.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield folder, opened


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"negative_prompt": "blue", "height": 48, "width": 80},
        {"guidance_scale": 1.0},
        {"height": 28, "width": 96, "num_images_per_prompt": 2, "negative_prompt": "x"},
        {"prompt": ["a star", LONG], "negative_prompt": ["x", "a blue circle"], "guidance_scale": 3.0},
        {"prompt_2": "a star", "prompt_3": "two circles of glass", "negative_prompt": "x", "negative_prompt_3": "blue"},
    ],
)
def test_text_to_image(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, opened(diffusers.StableDiffusion3Pipeline, checkpoint), **{**QUICK, **request_})


def test_image_to_image(checkpoint: Path, pipe: Pipeline) -> None:
    reference = opened(diffusers.StableDiffusion3Img2ImgPipeline, checkpoint)
    for request in ({}, {"strength": 0.9, "negative_prompt": "x"}):
        check(pipe, reference, image=picture(), prompt="a star", num_inference_steps=5, **request)


def test_inpainting(checkpoint: Path, pipe: Pipeline) -> None:
    """The latents; diffusers' pipeline leaves the VAE's shift out when it makes a picture of them."""
    reference = opened(diffusers.StableDiffusion3InpaintPipeline, checkpoint)
    for request in ({}, {"strength": 1.0, "negative_prompt": "x"}):
        shared = {**QUICK, "num_inference_steps": 5, "height": 64, "width": 64, "output_type": "latent", **request}
        shared |= {"image": picture(), "mask_image": mask()}
        wanted = reference(**shared, generator=torch.Generator().manual_seed(5)).images.numpy()
        ours = pipe(**shared, seed=5).images
        assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) <= RELATIVE


@pytest.mark.parametrize("request_", [{}, {"height": 48, "width": 80, "negative_prompt": "x", "prompt": LONG}])
def test_the_newer_one_without_t5(newer: tuple[Path, Pipeline], request_: dict[str, Any]) -> None:
    folder, pipe = newer
    reference = opened(diffusers.StableDiffusion3Pipeline, folder, text_encoder_3=None, tokenizer_3=None)
    check(pipe, reference, **{**QUICK, **request_})


def test_embeddings_stand_in_place_of_prompts(checkpoint: Path, pipe: Pipeline) -> None:
    reference = opened(diffusers.StableDiffusion3Pipeline, checkpoint)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    found = reference.encode_prompt("a star", None, None, negative_prompt="x", max_sequence_length=64)
    given = dict(zip(names, found, strict=True))  # of another length than the bundle's
    shared = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    wanted = reference(**given, **shared, generator=torch.Generator().manual_seed(1)).images.numpy()
    assert np.abs(pipe(**given, **shared, seed=1).images - wanted).max() < 1e-4


def test_the_manifest_says_what_the_pipelines_do(pipe: Pipeline, newer: tuple[Path, Pipeline]) -> None:
    manifest = pipe.bundle.manifest
    assert [each.max_length for each in manifest.tokenizers] == [77, 77, 256]
    assert [each.source for each in manifest.tokenizers] == ["prompt", "prompt_2", "prompt_3"]
    assert (manifest.default_num_inference_steps, manifest.default_guidance_scale) == (28, 7.0)
    assert manifest.latent.size_multiple == 4 and manifest.latent.default_height == 64
    assert len(newer[1].bundle.manifest.tokenizers) == 2


def test_what_would_not_fit_is_refused(tmp_path: Path) -> None:
    for key, value, message in (
        ("in_channels", 33, "inpainting and editing"),
        ("joint_attention_dim", 64, "belong to different checkpoints"),
        ("pooled_projection_dim", 64, "belong to different checkpoints"),
    ):
        folder = tiny_transformers.sd3(tmp_path / key)
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
            FAMILY.check(open_folder(folder, "tiny"))
