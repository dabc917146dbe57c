"""Checkpoints with the true architectures of Stable Diffusion and random weights, for measurements without downloads.

Run `python -m latentrt.benchmarks.random_checkpoint sd15 OUT`. Weights have unit gain per layer, so activations stay
finite in half precision too; pictures are noise. They are written tensor by tensor: memory stays below 1 GB.
"""

from __future__ import annotations

import json
import struct
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

Config = dict[str, Any]

SD15_UNET: Config = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SD_VAE: Config = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD21_UNET = SD15_UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SD21_TEXT = SD15_TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
TINY_UNET: Config = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
}
TINY_TEXT: Config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
TINY_VAE = SD_VAE | {
    "sample_size": 32,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
DEEP_UNET = TINY_UNET | {
    "block_out_channels": [32, 32, 32, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
DEEP_VAE = TINY_VAE | {
    "sample_size": 64,
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
Family = Literal["sd15", "sd21", "shallow-sd15", "tiny-sd15", "tiny-sd21"]
FAMILIES: dict[str, tuple[Config, Config, Config]] = {  # U-Net, text encoder, VAE
    "sd15": (SD15_UNET, SD15_TEXT, SD_VAE),
    "sd21": (SD21_UNET, SD21_TEXT, SD_VAE),
    "shallow-sd15": (
        SD15_UNET | {"layers_per_block": 1},
        SD15_TEXT | {"num_hidden_layers": 2},
        SD_VAE | {"layers_per_block": 1},
    ),
    "tiny-sd15": (TINY_UNET | {"attention_head_dim": 8}, SD15_TEXT | TINY_TEXT, TINY_VAE),
    "tiny-sd21": (
        DEEP_UNET | {"attention_head_dim": [1, 1, 1, 1], "use_linear_projection": True},
        SD21_TEXT | TINY_TEXT,
        DEEP_VAE,
    ),
}
SCHEDULER: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
WORDS = ("a", "red", "green", "blue", "circle", "square", "star", "on", "the", "background", "small", "large", "cat")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16")}


def write_random_checkpoint(
    family: Family, out: str | Path, *, seed: int = 0, precision: Literal["fp32", "fp16"] = "fp32"
) -> Path:
    """Write a diffusers folder of an architecture with random weights and return it.

    `sd21` predicts v and has OpenCLIP's text encoder; `shallow-sd15` has the full width and the fewest layers; `tiny-*`
    have the same parts with few weights, `tiny-sd21` as many levels as the full models.
    """
    out = Path(out)
    unet, text, vae = FAMILIES[family]
    second = family.endswith("sd21")
    size = write_tokenizer(out / "tokenizer", pad_token="!" if second else EOS)
    if family.startswith("tiny"):
        text = text | {"vocab_size": size}
    text = text | {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0 if second else size - 1}
    with torch.device("meta"):
        parts: dict[str, tuple[torch.nn.Module, Config, str]] = {
            "text_encoder": (CLIPTextModel(CLIPTextConfig(**text)), text, "model"),
            "unet": (UNet2DConditionModel(**unet), unet, "diffusion_pytorch_model"),
            "vae": (AutoencoderKL(**vae), vae, "diffusion_pytorch_model"),
        }
    for name, (module, config, stem) in parts.items():
        (out / name).mkdir()
        kind = {"model_type": "clip_text_model"} if name == "text_encoder" else {"_class_name": type(module).__name__}
        _write_json(out / name / "config.json", kind | config)
        shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        write_random_weights(out / name / f"{stem}.safetensors", shapes, seed=seed, precision=precision)
    scheduler = (
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
        if second
        else {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
    )
    (out / "scheduler").mkdir()
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler | SCHEDULER)
    index = {
        name: ["transformers" if name == "text_encoder" else "diffusers", type(m).__name__]
        for name, (m, _, _) in parts.items()
    }
    _write_json(
        out / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **index,
        },
    )
    return out


def write_tokenizer(folder: Path, *, pad_token: str = EOS) -> int:
    """Write a byte-level CLIP vocabulary of the letters and a few words; return its size."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(other))]  # GPT-2's alphabet
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for part in tail:
            merges.append((head, part))
            head += part
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(dict.fromkeys(tokens))})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", config)
    return len(set(tokens))


def write_random_weights(
    file: Path, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0, precision: Literal["fp32", "fp16"] = "fp32"
) -> None:
    """Write a safetensors file of random weights, one tensor in memory at a time."""
    dtype, code = DTYPES[precision]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            stream.write(_random_weight(name, shape, generator).to(dtype).numpy().tobytes())


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a weight of unit gain: variance 1/inputs for matrices and kernels, near one for norms, small otherwise."""
    weight = torch.randn(shape, generator=generator)
    if "embedding.weight" in name:
        return weight * 0.05
    if len(shape) > 1:
        return weight / torch.Size(shape[1:]).numel() ** 0.5
    return 1 + 0.05 * weight if name.endswith("weight") else 0.05 * weight


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.family, arguments.out, seed=arguments.seed, precision=arguments.precision)
