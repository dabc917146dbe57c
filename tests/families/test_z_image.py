"""Z-Image against diffusers' own pipelines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import CheckpointError, MissingPlanError, RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline
from latentrt.runtime.request import GenerationRequest
from latentrt.runtime.shapes import requested_shapes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.diffusers_folder import open_folder  # noqa: E402
from latentrt.export.checkpoints.streamed import filled  # noqa: E402
from latentrt.export.families.z_image import FAMILY  # noqa: E402
from latentrt.export.networks.qwen import chat_template  # noqa: E402

from . import tiny_flux, tiny_transformers  # noqa: E402
from .compare import check, mask, opened, picture  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 32}
LONG = "a photo of a star, a square and a triangle, " * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.z_image(tmp_path_factory.mktemp("z-image") / "base")


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(checkpoint, checkpoint.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield opened


def reference(kind: str, checkpoint: Path) -> Callable[..., Any]:
    """Return a pipeline of diffusers, which writes into the lists that it is given."""
    pipeline = opened(getattr(diffusers, kind), checkpoint)
    return lambda **request: pipeline(**copy.deepcopy(request))


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"negative_prompt": "blue", "height": 48, "width": 80},
        {"guidance_scale": 0.0},
        {"guidance_scale": 0.5},  # which guides, as 1 does
        {"height": 28, "width": 64, "num_images_per_prompt": 2, "negative_prompt": "x"},
        {"prompt": ["a star", LONG], "guidance_scale": 3.0},
        {"prompt": ["x", LONG * 20], "guidance_scale": 0.0},  # cut off
    ],
)
def test_text_to_image(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, reference("ZImagePipeline", checkpoint), **{**QUICK, **request_})


def test_image_to_image(checkpoint: Path, pipe: Pipeline) -> None:
    image_to_image = reference("ZImageImg2ImgPipeline", checkpoint)
    for request in ({}, {"strength": 0.9, "negative_prompt": "x"}):
        check(pipe, image_to_image, image=picture(48, 32), prompt="a star", num_inference_steps=5, **request)


def test_inpainting(checkpoint: Path, pipe: Pipeline) -> None:
    inpainting = reference("ZImageInpaintPipeline", checkpoint)
    for request in ({}, {"strength": 0.7, "negative_prompt": "x"}):
        sized = {**QUICK, "width": 48, **request}
        check(pipe, inpainting, image=picture(48, 32), mask_image=mask(48, 32), **sized)


def test_a_bucket_does_not_change_the_numbers(checkpoint: Path) -> None:
    opened_ = open_folder(checkpoint, "tiny")
    graphs = FAMILY.graphs(opened_, "fp32", {"tokenizer": 512})
    encoder, denoiser = graphs["text_encoder"]().module, graphs["denoiser"]().module
    words, found = 40, []
    torch.manual_seed(0)
    ids, latents = torch.randint(0, 256, (1, 512)), torch.randn(1, 16, 10, 14)
    with torch.no_grad(), filled(encoder), filled(denoiser):
        for length in (64, 128, 512):
            read = (torch.arange(length) < words).long()[None]
            context = encoder(ids[:, :length], read)
            found.append(denoiser(latents, torch.tensor([700.0]), context, read))
    assert all(torch.allclose(each, found[0], atol=1e-5) for each in found[1:])


def test_where_building_is_forbidden_a_prompt_is_filled_up_to_the_next_length_that_is_built(pipe: Pipeline) -> None:
    tried = list[tuple[int, int]]()

    class Session:
        backend = SimpleNamespace(dynamic=False)
        built: ClassVar = {(1, 512), (2, 256)}

        def prepare(self, inputs: dict[str, Any], *_: Any) -> None:
            tried.append((len(inputs["token_ids"]), inputs["token_ids"].shape[1]))
            if tried[-1] not in self.built:
                raise MissingPlanError(f"no plan for {tried[-1]}")

    request = GenerationRequest.of(prompt="a star", guidance_scale=0.0, height=32, width=32)
    request = request.with_defaults(pipe.bundle.manifest)
    table, session = pipe._table_for(request, chosen=False), Session()
    (batch,) = pipe._batches.split(request, table, session, 2, picture=False)  # type: ignore[arg-type]
    assert tried == [(1, 64), (1, 128), (1, 256), (1, 512)]
    assert batch.rows == 1 and batch.lengths == {"token_ids": 512}
    Session.built = {(2, 256)}
    (batch,) = pipe._batches.split(request, table, session, 2, picture=False)  # type: ignore[arg-type]
    assert batch.rows == 2 and batch.lengths == {"token_ids": 256}
    Session.built = set()
    with pytest.raises(MissingPlanError, match=r"no plan for \(1, 64\)"):
        list(pipe._batches.split(request, table, session, 2, picture=False))  # type: ignore[arg-type]


def test_shapes_are_those_of_as_many_tokens_as_are_asked_for(pipe: Pipeline) -> None:
    for tokens, length in ((None, 512), (1, 64), (64, 64), (65, 128), (512, 512)):
        shapes = requested_shapes(pipe.bundle, 32, 32, 1, prompt_tokens=tokens)
        assert shapes["denoiser"]["context"][1] == shapes["text_encoder"]["token_mask"][1] == length
    with pytest.raises(RequestError, match="this bundle has 512 at most"):
        requested_shapes(pipe.bundle, 32, 32, 1, prompt_tokens=513)


def test_the_manifest_says_what_the_pipelines_do(checkpoint: Path, pipe: Pipeline, tmp_path: Path) -> None:
    manifest = pipe.bundle.manifest
    assert manifest.tokenizers[0].template == "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert manifest.tokenizers[0].lengths == (64, 128, 256) and manifest.tokenizers[0].max_length == 512
    assert (manifest.default_num_inference_steps, manifest.default_guidance_scale) == (50, 5.0)
    assert isinstance(pipe.bundle, Bundle) and manifest.latent.size_multiple == 4
    turbo = open_folder(tiny_transformers.z_image(tmp_path / "turbo", shift=3.0), "turbo")
    assert FAMILY.defaults(turbo) == {
        "default_num_inference_steps": 8,
        "default_guidance_scale": 0.0,
        "default_strength": 0.6,
    }


def test_embeddings_cannot_stand_for_a_caption_and_its_mask(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="reads context, token_mask of a prompt"):
        pipe(prompt_embeds=np.zeros((1, 64, 32), np.float32))


def test_templates_that_change_prompts_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_flux.qwen_tokenizer()
    tokenizer.save_pretrained(tmp_path / "thinking")
    made = chat_template(tmp_path / "thinking", thinking=False)
    assert made.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tokenizer.chat_template = "{{ messages[0].content | trim }}"
    tokenizer.save_pretrained(tmp_path / "trimming")
    with pytest.raises(UnsupportedModelError, match="changes prompts"):
        chat_template(tmp_path / "trimming", thinking=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no chat template"):
        chat_template(tmp_path / "none", thinking=True)


def test_what_would_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="export in bf16 or fp32"):
        export_checkpoint(checkpoint, tmp_path / "half", precision="fp16")
    for part, key, value, message in (
        ("transformer", "siglip_feat_dim", 8, "no pictures among its captions"),
        ("transformer", "cap_feat_dim", 16, "belong to different checkpoints"),
        ("text_encoder", "use_sliding_window", True, "sliding windows"),
    ):
        other = tiny_transformers.z_image(tmp_path / key)
        file = other / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
            FAMILY.check(open_folder(other, "tiny"))
