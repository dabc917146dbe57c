"""Single files of the original layout: written here under the original names, read back as the same networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, UnsupportedModelError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402
from latentrt.export.checkpoints.checkpoint import Checkpoint  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.export.single_files.stable_diffusion import original_unet_name, original_vae_name  # noqa: E402


def original_tensors(source: Checkpoint, version: int) -> dict[str, Any]:
    """Return a checkpoint's weights under their original names."""
    tensors = {}
    for name, tensor in source.load("unet").state_dict().items():
        original = original_unet_name(name, layers=1)
        if name.startswith("up_blocks.0.upsamplers"):  # this level has no attention
            original = original.replace(".2.conv.", ".1.conv.")
        tensors[f"model.diffusion_model.{original}"] = tensor
    for name, tensor in source.load("vae").state_dict().items():
        if re.search(r"attentions\.0\.to_.*weight", name):
            tensor = tensor[:, :, None, None]
        tensors[f"first_stage_model.{original_vae_name(name, levels=3)}"] = tensor
    text = {name.removeprefix("text_model."): t for name, t in source.load("text_encoder").state_dict().items()}
    tensors |= {f"cond_stage_model.{k}": v for k, v in (clip(text) if version == 1 else open_clip(text)).items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def clip(text: dict[str, Any]) -> dict[str, Any]:
    return {f"transformer.text_model.{name}": tensor for name, tensor in text.items()}


def open_clip(text: dict[str, Any]) -> dict[str, Any]:
    """OpenCLIP's names, with the last layer that the second version does not use."""
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }
    for layer in range(3):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{min(layer, 1)}."
        for kind in ("weight", "bias"):
            stacked = [text[f"{new}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{old}attn.in_proj_{kind}"] = torch.cat(stacked)
            tensors[f"{old}attn.out_proj.{kind}"] = text[f"{new}self_attn.out_proj.{kind}"]
            tensors[f"{old}ln_1.{kind}"] = text[f"{new}layer_norm1.{kind}"]
            tensors[f"{old}ln_2.{kind}"] = text[f"{new}layer_norm2.{kind}"]
            tensors[f"{old}mlp.c_fc.{kind}"] = text[f"{new}mlp.fc1.{kind}"]
            tensors[f"{old}mlp.c_proj.{kind}"] = text[f"{new}mlp.fc2.{kind}"]
    return {f"model.{name}": tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def source(request: pytest.FixtureRequest, version: int) -> Path:
    return request.getfixturevalue({1: "tiny_sd15_checkpoint", 2: "tiny_sd21_checkpoint"}[version])


@pytest.fixture
def file(source: Path, version: int, tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    safetensors.save_file(original_tensors(open_checkpoint(source), version), file)
    return file


def test_names_are_what_diffusers_takes_for_the_original(source: Path, file: Path) -> None:
    """diffusers' own conversion, an independent inverse, gives back the U-Net and the autoencoder."""
    checkpoint, tensors = open_checkpoint(source), safetensors.load_file(file)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(checkpoint.config("unet")))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(checkpoint.config("vae")))
    for converted, module in ((unet, checkpoint.load("unet")), (vae, checkpoint.load("vae"))):
        expected = module.state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_single_file_gives_the_networks_it_was_written_from(source: Path, file: Path) -> None:
    folder, single = open_checkpoint(source), open_checkpoint(file, tokenizer=source)
    family_named(single.family).check(single)
    assert (single.name, single.tokenizers["tokenizer"].folder) == ("model.safetensors", source / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 400, (2, 77), generator=generator)
    with torch.no_grad():
        contexts = [each.load("text_encoder")(ids).last_hidden_state for each in (folder, single)]
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        predictions = [each.load("unet")(latents, 500, contexts[0]).sample for each in (folder, single)]
        pictures = [each.load("vae").decode(latents).sample for each in (folder, single)]
        moments = [each.load("vae").encode(pictures[0]).latent_dist.mean for each in (folder, single)]
    for expected, found in (contexts, predictions, pictures, moments):
        assert torch.equal(expected, found)


def test_scheduler_of_a_single_file(source: Path, file: Path, version: int) -> None:
    expected = dict(open_checkpoint(source).scheduler)
    assert dict(open_checkpoint(file, tokenizer=source).scheduler) == expected
    asked = open_checkpoint(file, tokenizer=source, prediction_type="epsilon")
    assert asked.scheduler["prediction_type"] == "epsilon"
    assert asked.config("unet")["sample_size"] == 64
    assert open_checkpoint(file, tokenizer=source).config("unet")["sample_size"] == (64 if version == 1 else 96)
    assert asked.tokenizers["tokenizer"].pad_id == (None if version == 1 else 0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: not name.startswith("cond_stage_model."), "has no text encoder"),
        (lambda name: not name.startswith("model.diffusion_model."), "not in the original layout of Stable Diffusion"),
        (lambda name: not name.startswith("first_stage_model."), "post_quant_conv|has no tensor"),
    ],
)
def test_incomplete_single_files(tiny_sd15_checkpoint: Path, tmp_path: Path, keep: Any, message: str) -> None:
    tensors = original_tensors(open_checkpoint(tiny_sd15_checkpoint), 1)
    file = tmp_path / "model.safetensors"
    safetensors.save_file({name: tensor for name, tensor in tensors.items() if keep(name)}, file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file, tokenizer=tiny_sd15_checkpoint)


def test_other_families_in_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.save_file({"conditioner.embedders.0.x": torch.zeros(1)}, file)
    with pytest.raises(UnsupportedModelError, match="Stable Diffusion XL"):
        open_checkpoint(file)
