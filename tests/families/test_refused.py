"""Checkpoints that cannot be exported: every kind is refused with a line that names it and says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, UnsupportedModelError
from latentrt.export import export_checkpoint

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from . import tiny, tiny_flux  # noqa: E402
from .original_layouts import flux_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PIPELINES = (
    "CogVideoXPipeline",
    "FluxControlNetPipeline",
    "FluxControlPipeline",
    "FluxFillPipeline",
    "Flux2KleinKVPipeline",
    "FluxKontextPipeline",
    "IFPipeline",
    "KandinskyV22Pipeline",
    "LTXPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "StableCascadeCombinedPipeline",
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionUpscalePipeline",
    "StableVideoDiffusionPipeline",
    "WanPipeline",
)


def refused(source: Path, error: type[Exception], message: str, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        export_checkpoint(source, tmp_path / "bundle", **options)
    assert "\n" not in str(caught.value) and source.name in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipelines_of_other_families(tmp_path: Path, pipeline: str) -> None:
    assert hasattr(diffusers, pipeline)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    message = f"pipeline '{pipeline}' is not supported, only .*StableDiffusionXLPipeline"
    refused(tmp_path / "model", UnsupportedModelError, message, tmp_path)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.mark.parametrize(
    ("component", "declared", "message"),
    [
        ("text_encoder_2", ["transformers", "Mistral3ForConditionalGeneration"], "only T5EncoderModel is supported"),
        ("transformer", ["diffusers", "ChromaTransformer2DModel"], "only FluxTransformer2DModel is supported"),
        ("transformer", ["my_code", "FluxTransformer2DModel"], "code that comes with a checkpoint is not run"),
        ("vae", ["diffusers", "AutoencoderTiny"], "only AutoencoderKL is supported"),
        ("tokenizer_2", ["transformers", "GemmaTokenizer"], "only T5Tokenizer is supported"),
        ("vae", None, "vae is null"),
    ],
)
def test_parts_of_other_classes(dev: Path, tmp_path: Path, component: str, declared: Any, message: str) -> None:
    folder = shutil.copytree(dev, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {component: declared}))
    refused(folder, UnsupportedModelError, message, tmp_path)


CONFIGS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes 8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "gguf": {"quant_method": "gguf", "compute_dtype": "bfloat16"},
    "quanto": {"quant_method": "quanto", "weights_dtype": "float8"},
    "modelopt": {"quant_method": "modelopt", "quant_type": "NVFP4"},
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2"])
def test_quantized_components(dev: Path, tmp_path: Path, component: str, method: str) -> None:
    folder = shutil.copytree(dev, tmp_path / "quantized")
    file = folder / component / "config.json"
    config = json.loads(file.read_text())
    if component == "text_encoder":  # out of a larger model, whose text model has a section of its own
        config = {"model_type": "clip", "text_config": config}
    file.write_text(json.dumps(config | {"quantization_config": CONFIGS[method]}))
    refused(
        folder,
        UnsupportedModelError,
        rf"{component} is quantized \('{CONFIGS[method]['quant_method']}' in quantization_config\)",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"scaled_fp8": torch.zeros(2)}, "fp8 with scales: it has a tensor 'scaled_fp8'"),
        ({"double_blocks.0.img_mlp.0.scale_weight": torch.ones(())}, "fp8 with scales"),
        ({"double_blocks.0.img_mlp.0.comfy_quant": torch.ones(4, dtype=torch.uint8)}, "a layout of ComfyUI"),
        ({"double_blocks.0.img_mlp.0.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({"double_blocks.0.img_mlp.0.weight.absmax": torch.ones(4)}, "bitsandbytes 4-bit"),
        ({"double_blocks.0.img_mlp.0.qweight": torch.ones(4, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"double_blocks.0.img_mlp.0.weight._scale": torch.ones(4)}, "quanto"),
        ({"double_blocks.0.img_mlp.0.W_q": torch.ones(4, dtype=torch.uint8)}, "HQQ"),
    ],
)
def test_quantized_single_files(dev: Path, tmp_path: Path, added: dict[str, Any], message: str) -> None:
    save_file(flux_tensors("") | added, tmp_path / "flux1-dev.safetensors")
    refused(tmp_path / "flux1-dev.safetensors", UnsupportedModelError, message, tmp_path, base=dev)


def test_integers_where_numbers_should_be(dev: Path, tmp_path: Path) -> None:
    """Whatever the names: a format that is not known by them."""
    tensors = flux_tensors("")
    tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"'img_in.weight' is torch.int8, which is quantized"):
        open_checkpoint(tmp_path / "flux1-dev.safetensors", base=dev).load("transformer")


def test_gguf_files(dev: Path, tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF\3\0\0\0")
    refused(tmp_path / "flux1-dev-Q4_K_S.gguf", UnsupportedModelError, "is a GGUF file", tmp_path, base=dev)
    shutil.copy(tmp_path / "flux1-dev-Q4_K_S.gguf", tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", CheckpointError, "not a safetensors file", tmp_path, base=dev)


@pytest.mark.parametrize("channels", [7, 8])
def test_u_nets_that_read_other_pictures(tmp_path: Path, channels: int) -> None:
    """Upscalers and editors under the name of an ordinary pipeline."""
    for write in (tiny.sd15, tiny.sdxl):
        folder = write(tmp_path / write.__name__, in_channels=channels)
        refused(folder / ".", UnsupportedModelError, f"takes {channels} and gives 4 channels", tmp_path)


def test_a_vae_of_another_family(dev: Path, tmp_path: Path) -> None:
    folder = tiny_flux.klein(tmp_path / "klein")
    message = "is AutoencoderKL, where FLUX.2-klein has AutoencoderKLFlux2"
    with pytest.raises(UnsupportedModelError, match=message):
        export_checkpoint(folder, tmp_path / "bundle", vae=dev)
    tensors = load_file(dev / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        export_checkpoint(folder, tmp_path / "bundle", vae=tmp_path / "vae.safetensors")
