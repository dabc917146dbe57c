"""FLUX.2-dev against diffusers' own pipeline: an embedded guidance scale, a language model filled up on either side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
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
from latentrt.export.checkpoints.streamed import filled  # noqa: E402
from latentrt.export.families.flux2_dev import FAMILY  # noqa: E402
from latentrt.export.verify import verify  # noqa: E402

from . import tiny_flux  # noqa: E402
from .compare import OF_A_FLUX2, check, check_refused, check_seen, opened  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.flux2_dev(tmp_path_factory.mktemp("flux2-dev") / "checkpoint")


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    bundle = export_checkpoint(checkpoint, checkpoint.with_name("bundle"))
    with Pipeline.open(bundle, "onnxruntime-cpu") as opened:
        yield opened


def reference(folder: Path) -> Callable[..., Any]:
    """Return diffusers' pipeline, whose latents [B, S, C] are tokens of four pixels on each side."""
    pipeline = opened(diffusers.Flux2Pipeline, folder)

    def draw(**request: Any) -> Any:
        result = pipeline(**request)
        if request["output_type"] == "latent":
            cells = (request["height"] // 4, request["width"] // 4)
            result.images = result.images.transpose(1, 2).unflatten(2, cells)
        return result

    return draw


@pytest.mark.parametrize(
    "request_",
    [*OF_A_FLUX2, {"max_sequence_length": 256, "prompt": ["a star", "a blue square of glass, " * 20]}],
)
def test_text_to_image(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, reference(checkpoint), **{**QUICK, **request_})


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_text_encoder_on_rows_that_are_filled_up(tmp_path: Path, side: str) -> None:
    folder = tiny_flux.flux2_dev(tmp_path / side, side=side)
    pipeline = diffusers.Flux2Pipeline.from_pretrained(str(folder))
    opened = open_folder(folder, side)
    graph = FAMILY.graphs(opened, "fp32", {"tokenizer": 512})["text_encoder"]()
    template = FAMILY.tokenizer_kinds(opened)["tokenizer"].template
    for prompt in ("a star", "a star of glass, " * 100):
        with torch.no_grad():
            wanted, _ = pipeline.encode_prompt(prompt)
            ids = pipeline.tokenizer(template.format(prompt), add_special_tokens=False).input_ids[:512]
            rows = torch.tensor([ids + [pipeline.tokenizer.pad_token_id] * (512 - len(ids))])
            with filled(graph.module):
                found = graph.module(rows, (torch.arange(512) < len(ids)).long()[None])
        assert torch.allclose(found, wanted, atol=1e-4), (found - wanted).abs().max()


def test_verify_compares_with_the_text_encoder_that_diffusers_opens(checkpoint: Path, pipe: Pipeline) -> None:
    report = verify(pipe.bundle.path, checkpoint, backend="onnxruntime-cpu", steps=2)
    assert report.within and {each.tensor for each in report.tensors} >= {"text_encoder.context"}


def test_prompt_and_guidance_are_seen_and_no_negative_prompt(pipe: Pipeline) -> None:
    plain = check_seen(pipe, QUICK, {"prompt": "a star"}, {"guidance_scale": 9.0})
    assert np.array_equal(pipe(**QUICK, seed=1, output_type="latent", negative_prompt="a star").images, plain)


def test_the_manifest_holds_what_the_pipeline_does(pipe: Pipeline) -> None:
    manifest = pipe.bundle.manifest
    assert (manifest.default_guidance_scale, manifest.default_num_inference_steps) == (4.0, 50)
    assert manifest.guidance.above is None and manifest.inputs[0].name == "guidance"
    (tokenizer,) = manifest.tokenizers
    start, _, end = tokenizer.template.partition("{}")
    assert start.startswith("<s>[SYSTEM_PROMPT]You are an AI that reasons") and start.endswith("[INST]")
    assert end == "[/INST]" and tokenizer.max_length == 512


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        (
            "text_encoder/config.json",
            '"sliding_window": null',
            '"sliding_window": 64',
            UnsupportedModelError,
            "64, and",
        ),
        (
            "text_encoder/config.json",
            '"num_hidden_layers": 31',
            '"num_hidden_layers": 30',
            UnsupportedModelError,
            "30 layers",
        ),
        (
            "transformer/config.json",
            '"joint_attention_dim": 48',
            '"joint_attention_dim": 64',
            CheckpointError,
            "text encoder gives 48",
        ),
        ("tokenizer/chat_template.jinja", "{{- bos_token }}", "", UnsupportedModelError, "does not begin"),
        ("tokenizer/chat_template.jinja", "block['text']", "block['text'] | trim", UnsupportedModelError, "changes"),
    ],
)
def test_other_checkpoints_are_refused_in_a_line(
    checkpoint: Path, tmp_path: Path, file: str, old: str, new: str, error: type[Exception], message: str
) -> None:
    check_refused(checkpoint, tmp_path / "other", file, old, new, error, message)


def test_the_class_that_the_published_checkpoint_names_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    FAMILY.check(open_folder(folder, "other"))
