"""FLUX.2-klein against diffusers' own pipeline: the base, which is guided, and distilled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.diffusers_folder import open_folder  # noqa: E402
from latentrt.export.families.flux2 import FAMILY  # noqa: E402

from . import tiny_flux  # noqa: E402
from .compare import OF_A_FLUX2, check, check_refused, check_seen, opened  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.klein(tmp_path_factory.mktemp("klein") / "base")


@pytest.fixture(scope="module")
def pipe(base: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(base, base.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def distilled(base: Path, pipe: Pipeline) -> Iterator[Pipeline]:
    """The same graphs under what the manifest of a distilled checkpoint says of guidance."""
    folder = shutil.copytree(base, base.with_name("distilled"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"is_distilled": false', '"is_distilled": true'))
    checkpoint = open_folder(folder, "distilled")
    bundle = shutil.copytree(pipe.bundle.path, base.with_name("distilled-bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest |= {"guidance": FAMILY.guidance(checkpoint).model_dump(mode="json"), **FAMILY.defaults(checkpoint)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with Pipeline.open(bundle, "onnxruntime-cpu") as opened:
        yield opened


def reference(folder: Path) -> Callable[..., Any]:
    """Return diffusers' pipeline, whose latents are normal and in squares, as the transformer has them."""
    pipeline = opened(diffusers.Flux2KleinPipeline, folder)
    norm = pipeline.vae.bn

    def draw(**request: Any) -> Any:
        result = pipeline(**request)
        if request["output_type"] == "latent":
            squares = pipeline._patchify_latents(result.images)
            deviation = (norm.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
            result.images = (squares - norm.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
        return result

    return draw


@pytest.mark.parametrize(
    "request_",
    [
        *OF_A_FLUX2,
        {"sigmas": [1.0, 0.6, 0.2]},
        {"max_sequence_length": 64, "prompt": ["a star", "a blue square of glass, " * 20]},
    ],
)
def test_text_to_image(base: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, reference(base), **{**QUICK, **request_})


def test_a_distilled_checkpoint_is_never_guided(base: Path, distilled: Pipeline) -> None:
    manifest = distilled.bundle.manifest
    assert (manifest.default_guidance_scale, manifest.default_num_inference_steps) == (1.0, 4)
    draw = reference(base.with_name("distilled"))
    for request in ({}, {"guidance_scale": 4.0, "width": 48}):
        check(distilled, draw, **{**QUICK, **request})


def test_prompt_guidance_and_negative_prompt_are_seen(pipe: Pipeline) -> None:
    check_seen(pipe, QUICK, {"prompt": "a star"}, {"guidance_scale": 9.0}, {"negative_prompt": "a star"})


def test_the_manifest_holds_geometry_and_conversation(pipe: Pipeline) -> None:
    manifest, latent = pipe.bundle.manifest, pipe.bundle.manifest.latent
    assert (latent.channels, latent.downscale, latent.size_multiple, latent.default_height) == (32, 4, 4, 256)
    assert (manifest.default_guidance_scale, manifest.default_num_inference_steps) == (4.0, 50)
    (tokenizer,) = manifest.tokenizers
    assert tokenizer.max_length == 512 and tokenizer.template.endswith("<think>\n\n</think>\n\n")


def test_pictures_to_start_from_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="image"):
        pipe(**QUICK, image=Image.new("RGB", (32, 32)))


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        (
            "transformer/config.json",
            '"in_channels": 32',
            '"in_channels": 64',
            UnsupportedModelError,
            "takes 64 and gives 64",
        ),
        (
            "transformer/config.json",
            '"joint_attention_dim": 48',
            '"joint_attention_dim": 64',
            CheckpointError,
            "text encoder gives 48",
        ),
        (
            "text_encoder/config.json",
            '"num_hidden_layers": 28',
            '"num_hidden_layers": 27',
            UnsupportedModelError,
            "27 layers",
        ),
        (
            "model_index.json",
            '"Qwen3ForCausalLM"',
            '"Mistral3ForConditionalGeneration"',
            UnsupportedModelError,
            "only Qwen3ForCausalLM",
        ),
    ],
)
def test_other_checkpoints_are_refused_in_a_line(
    base: Path, tmp_path: Path, file: str, old: str, new: str, error: type[Exception], message: str
) -> None:
    check_refused(base, tmp_path / "other", file, old, new, error, message)
