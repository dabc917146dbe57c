"""Every kind of source, and a clear refusal for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, LatentRTError, RequestError, UnsupportedModelError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("diffusers")

from latentrt.export.checkpoints.checkpoint import Checkpoint  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint, tokenizer_folder  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd15_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd15_checkpoint, tmp_path / "checkpoint"))


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    modules = (checkpoint.load("text_encoder"), checkpoint.load("unet"), checkpoint.load("vae"))
    return {f"{n}.{k}": v for n, module in enumerate(modules) for k, v in module.state_dict().items()}


def same_weights(first: Checkpoint, second: Checkpoint) -> bool:
    one, two = weights_of(first), weights_of(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def rename_weights(file: Path, rename: Callable[[str], str]) -> None:
    safetensors.save_file({rename(k): v for k, v in safetensors.load_file(file).items()}, file)


def test_modules_hold_the_files_weights(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == "checkpoint"
    assert checkpoint.revision is None
    stored = safetensors.load_file(folder / UNET)
    unet = checkpoint.load("unet")
    assert not unet.training
    assert {key: torch.equal(value, stored[key]) for key, value in unet.state_dict().items()} == dict.fromkeys(
        stored, True
    )
    text = checkpoint.load("text_encoder")
    assert not any(buffer.is_meta for buffer in text.buffers())


def test_text_encoder_names_with_and_without_prefix(folder: Path) -> None:
    original = open_checkpoint(folder)
    before = weights_of(original)
    file = folder / "text_encoder/model.safetensors"
    prefixed = any(key.startswith("text_model.") for key in safetensors.load_file(file))
    rename_weights(file, lambda key: key.removeprefix("text_model.") if prefixed else f"text_model.{key}")
    after = weights_of(open_checkpoint(folder))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_old_attention_names_of_the_vae(folder: Path) -> None:
    before = weights_of(open_checkpoint(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    rename_weights(folder / "vae/diffusion_pytorch_model.safetensors", rename)
    after = weights_of(open_checkpoint(folder))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_variant_is_the_second_choice(folder: Path) -> None:
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    safetensors.save_file({k: v.half() for k, v in safetensors.load_file(folder / UNET).items()}, half)
    assert UNET in open_checkpoint(folder).files
    (folder / UNET).unlink()
    checkpoint = open_checkpoint(folder)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in checkpoint.files
    assert {value.dtype for value in checkpoint.load("unet").state_dict().values()} == {torch.float32}


def test_sharded_weights(folder: Path) -> None:
    whole = open_checkpoint(folder)
    expected = weights_of(whole)
    tensors = safetensors.load_file(folder / UNET)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for shard, keys in shards.items():
        safetensors.save_file({key: tensors[key] for key in keys}, folder / "unet" / shard)
    table = {key: shard for shard, keys in shards.items() for key in keys}
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    (folder / UNET).unlink()
    checkpoint = open_checkpoint(folder)
    assert len([file for file in checkpoint.files if file.startswith("unet/")]) == 2
    assert all(torch.equal(expected[key], value) for key, value in weights_of(checkpoint).items())


def test_defaults_of_a_request_beside_what_diffusers_reads(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    assert open_checkpoint(folder).defaults == {}
    edit_json(folder / "model_index.json", _latentrt={"default_guidance_scale": 4.5, "default_num_inference_steps": 20})
    assert open_checkpoint(folder).defaults == {"default_guidance_scale": 4.5, "default_num_inference_steps": 20}
    assert StableDiffusionPipeline.from_pretrained(str(folder)).unet is not None


def only_pickles(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def truncate(folder: Path) -> None:
    with (folder / UNET).open("r+b") as stream:
        stream.truncate((folder / UNET).stat().st_size // 2)


REFUSALS: dict[str, tuple[Callable[[Path], object], type[LatentRTError], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), CheckpointError, r"model_index\.json is missing"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), CheckpointError, "cannot be read as JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), CheckpointError, "JSON object"),
    "bad defaults": (
        lambda f: edit_json(f / "model_index.json", _latentrt=4.0),
        CheckpointError,
        r"_latentrt is 4\.0; give numbers for default_guidance_scale and",
    ),
    "other pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        UnsupportedModelError,
        "'FluxPipeline' is not supported, only StableDiffusionPipeline",
    ),
    "other text encoder": (
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        UnsupportedModelError,
        "text_encoder is 'T5EncoderModel'; only CLIPTextModel",
    ),
    "component missing": (lambda f: shutil.rmtree(f / "vae"), CheckpointError, r"vae/config\.json is missing"),
    "config missing": (lambda f: (f / "unet/config.json").unlink(), CheckpointError, r"unet/config\.json is missing"),
    "weights missing": (lambda f: (f / UNET).unlink(), CheckpointError, r"unet has no diffusion_pytorch_model"),
    "only pickles": (only_pickles, CheckpointError, "only a pickle: .*runs the code inside it"),
    "truncated": (truncate, CheckpointError, r"unet/diffusion_pytorch_model\.safetensors is truncated"),
    "not safetensors": (lambda f: (f / UNET).write_bytes(b"PK\x03\x04 zip"), CheckpointError, "not a safetensors file"),
    "tokenizer missing": (
        lambda f: shutil.rmtree(f / "tokenizer"),
        CheckpointError,
        r"tokenizer has no tokenizer\.json",
    ),
    "scheduler missing": (
        lambda f: shutil.rmtree(f / "scheduler"),
        CheckpointError,
        r"scheduler_config\.json is missing",
    ),
    "inpainting": (
        lambda f: edit_json(f / "unet/config.json", in_channels=9),
        UnsupportedModelError,
        "takes 9 and gives 4 channels",
    ),
    "turbo": (
        lambda f: edit_json(f / "unet/config.json", time_cond_proj_dim=256),
        UnsupportedModelError,
        "option time_cond_proj_dim=256",
    ),
    "text encoder of another model": (
        lambda f: edit_json(f / "unet/config.json", cross_attention_dim=768),
        CheckpointError,
        "cross_attention_dim is 768 where the text encoder gives 64",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_folders(folder: Path, case: str) -> None:
    break_it, error, message = REFUSALS[case]
    break_it(folder)
    with pytest.raises(error, match=message) as raised:
        opened = open_checkpoint(folder)
        family_named(opened.family).check(opened)
    assert "\n" not in str(raised.value)


def test_missing_weight_is_named(folder: Path) -> None:
    tensors = safetensors.load_file(folder / UNET)
    del tensors["conv_out.bias"]
    safetensors.save_file(tensors, folder / UNET)
    with pytest.raises(CheckpointError, match=r"has no weight 'conv_out\.bias'"):
        open_checkpoint(folder).load("unet")


def test_weight_of_another_shape_is_named(folder: Path) -> None:
    edit_json(folder / "unet/config.json", block_out_channels=[32, 128])
    with pytest.raises(CheckpointError, match=r"weight '.*' has shape \[.*\] where its config asks for \["):
        open_checkpoint(folder).load("unet")


def test_quantized_weights_are_refused(folder: Path) -> None:
    tensors = safetensors.load_file(folder / UNET)
    tensors["conv_out.bias"] = tensors["conv_out.bias"].to(torch.int8)
    safetensors.save_file(tensors, folder / UNET)
    with pytest.raises(UnsupportedModelError, match=r"torch\.int8; quantized weights"):
        open_checkpoint(folder).load("unet")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_pickled_files_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="opening a pickle runs the code inside it"):
        open_checkpoint(file)


@pytest.mark.parametrize("name", ["/nowhere/model", "model", "model.safetensors", "a/b/c", "../x", "org/"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(name)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.touch()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        open_checkpoint(file)


def test_options_that_a_folder_cannot_use(folder: Path) -> None:
    with pytest.raises(RequestError, match="are for single"):
        open_checkpoint(folder, prediction_type="epsilon")
    with pytest.raises(RequestError, match="choose epsilon or v_prediction"):
        open_checkpoint(folder, prediction_type="x0")


def test_tokenizer_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        tokenizer_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json or vocab\.json"):
        tokenizer_folder(tmp_path)
