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

from .loaded import loaded  # noqa: E402

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd15_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd15_checkpoint, tmp_path / "checkpoint"))


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    modules = (loaded(checkpoint, "text_encoder"), loaded(checkpoint, "unet"), loaded(checkpoint, "vae"))
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
    unet = loaded(checkpoint, "unet")
    assert not unet.training
    assert {key: torch.equal(value, stored[key]) for key, value in unet.state_dict().items()} == dict.fromkeys(
        stored, True
    )
    text = loaded(checkpoint, "text_encoder")
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


def test_defaults_of_a_request_beside_what_diffusers_reads(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    assert open_checkpoint(folder).defaults == {}
    edit_json(folder / "model_index.json", _latentrt={"default_guidance_scale": 4.5, "default_num_inference_steps": 20})
    assert open_checkpoint(folder).defaults == {"default_guidance_scale": 4.5, "default_num_inference_steps": 20}
    assert StableDiffusionPipeline.from_pretrained(str(folder)).unet is not None


def in_index(**components: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "model_index.json", **components)


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
        lambda f: edit_json(f / "model_index.json", _class_name="PixArtSigmaPipeline"),
        UnsupportedModelError,
        "'PixArtSigmaPipeline' is not supported, only .*StableDiffusionPipeline",
    ),
    "other text encoder": (
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        UnsupportedModelError,
        "text_encoder is 'T5EncoderModel'; only CLIPTextModel",
    ),
    "component missing": (lambda f: shutil.rmtree(f / "vae"), CheckpointError, r"vae/config\.json is missing"),
    "config missing": (lambda f: (f / "unet/config.json").unlink(), CheckpointError, r"unet/config\.json is missing"),
    "weights missing": (lambda f: (f / UNET).unlink(), CheckpointError, r"unet has no diffusion_pytorch_model"),
    "null component": (in_index(unet=None), UnsupportedModelError, "component unet is null"),
    "component of nulls": (in_index(vae=[None, None]), UnsupportedModelError, "vae is null .*, or --vae"),
    "component of a word": (in_index(unet="UNet"), UnsupportedModelError, "unet is 'UNet'; only UNet2DConditionModel"),
    "code of a component": (
        in_index(unet=["my_unet", "UNet2DConditionModel"]),
        UnsupportedModelError,
        "unet is a class of 'my_unet', where diffusers's is supported: code that comes",
    ),
    "code of a pipeline": (
        in_index(_class_name=["my_pipeline", "MyPipeline"]),
        UnsupportedModelError,
        r"\['my_pipeline', 'MyPipeline'\] is a pipeline with code of its own, which is not run",
    ),
    "no scheduler": (in_index(scheduler=[None, None]), UnsupportedModelError, "name a class of diffusers"),
    "other tokenizer": (
        in_index(tokenizer=["transformers", "T5Tokenizer"]),
        UnsupportedModelError,
        "tokenizer is 'T5Tokenizer'; only CLIPTokenizer",
    ),
    "attention mask": (
        lambda f: edit_json(f / "text_encoder/config.json", use_attention_mask=True),
        UnsupportedModelError,
        "use_attention_mask is True; text encoders that mask the padding",
    ),
    "shifted latents": (
        lambda f: edit_json(f / "vae/config.json", shift_factor=0.1159),
        UnsupportedModelError,
        r"shift_factor is 0\.1159",
    ),
    "no factor": (
        lambda f: edit_json(f / "vae/config.json", scaling_factor=0),
        CheckpointError,
        "scaling_factor is 0 in its config; give a number that is finite and not zero",
    ),
    "factor of no float": (
        lambda f: edit_json(f / "vae/config.json", scaling_factor=10**400),
        CheckpointError,
        "scaling_factor is 1000.* in its config; give a number that is finite",
    ),
    "more layers than tensors": (
        lambda f: edit_json(f / "unet/config.json", layers_per_block=10**6),
        CheckpointError,
        r"asks for more layers \(layers_per_block 1000000.*than its files have tensors",
    ),
    "quantized by config": (
        lambda f: edit_json(f / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        UnsupportedModelError,
        r"is quantized \('bitsandbytes' in quantization_config\): only plain",
    ),
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
        loaded(open_checkpoint(folder), "unet")


def test_weight_of_another_shape_is_named(folder: Path) -> None:
    edit_json(folder / "unet/config.json", block_out_channels=[32, 128])
    with pytest.raises(CheckpointError, match=r"weight '.*' has shape \[.*\] where its config asks for \["):
        loaded(open_checkpoint(folder), "unet")


def test_what_diffusers_ignores_in_the_index_and_the_configs(folder: Path) -> None:
    before = weights_of(open_checkpoint(folder))
    edit_json(
        folder / "model_index.json",
        image_encoder=[None, None],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        watermark=["my_module", "Watermark"],
        note="hello",
    )
    for part in ("unet", "vae", "text_encoder"):
        edit_json(folder / part / "config.json", _name_or_path="../../elsewhere/unet", not_an_option=[1, {"a": None}])
    opened = open_checkpoint(folder)
    family_named(opened.family).check(opened)
    after = weights_of(opened)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_text_config_inside_a_whole_clip_config(folder: Path) -> None:
    """transformers reads the text encoder's part of a config that also describes a vision model."""
    from transformers import CLIPTextModel

    file = folder / "text_encoder/config.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "clip", "hidden_size": 7, "text_config": own}))
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    ours = loaded(open_checkpoint(folder), "text_encoder").state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


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


def test_gguf_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="a GGUF file, whose weights are quantized"):
        open_checkpoint("model.gguf")


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
