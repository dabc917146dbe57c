"""Single files of the original layouts, written from tiny diffusers folders.

diffusers' own conversion says whether the names are right: a test turns every file back with it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from latentrt.benchmarks.random_checkpoint import write_random_weights
from latentrt.export.checkpoints.sources import open_checkpoint
from latentrt.export.single_files.names import original_unet_name, original_vae_name
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from .loaded import loaded


def with_text_layers(source: Path, folder: Path, layers: int) -> Path:
    """Copy a tiny folder and give it a text encoder of another depth."""
    shutil.copytree(source, folder)
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": layers}
    file.write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in CLIPTextModel(CLIPTextConfig.from_dict(config)).state_dict().items()}
    write_random_weights(folder / "text_encoder" / "model.safetensors", shapes, seed=5)
    return folder


def original_tensors(folder: Path, version: int, spare_layers: int = 0) -> dict[str, Any]:
    """Return a folder's weights under their original names; `spare_layers` more text layers follow in version 2."""
    source = open_checkpoint(folder)
    tensors = {}
    for name, tensor in loaded(source, "unet").state_dict().items():
        original = original_unet_name(name, layers=1)
        if name.startswith("up_blocks.0.upsamplers"):  # this level has no attention
            original = original.replace(".2.conv.", ".1.conv.")
        tensors[f"model.diffusion_model.{original}"] = tensor
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(folder / "vae").items()}
    text = {name.removeprefix("text_model."): t for name, t in loaded(source, "text_encoder").state_dict().items()}
    old = clip(text) if version == 1 else open_clip(text, spare_layers)
    tensors |= {f"cond_stage_model.{k}": v for k, v in old.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def original_vae(folder: Path) -> dict[str, Any]:
    """Return a VAE folder's weights under the original names, where attention has 1×1 convolutions."""
    stored, tensors = load_file(folder / "diffusion_pytorch_model.safetensors"), {}
    levels = len({name.split(".")[2] for name in stored if name.startswith("decoder.up_blocks.")})
    for name, tensor in stored.items():
        if re.search(r"attentions\.0\.to_.*weight", name):
            tensor = tensor[:, :, None, None]
        tensors[original_vae_name(name, levels)] = tensor.contiguous()
    return tensors


def clip(text: dict[str, Any]) -> dict[str, Any]:
    return {f"transformer.text_model.{name}": tensor for name, tensor in text.items()}


def open_clip(text: dict[str, Any], spare_layers: int) -> dict[str, Any]:
    """OpenCLIP's names; the spare layers are copies of the last one."""
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }
    count = len({name.split(".")[2] for name in text if name.startswith("encoder.layers.")})
    for layer in range(count + spare_layers):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{min(layer, count - 1)}."
        for kind in ("weight", "bias"):
            stacked = [text[f"{new}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{old}attn.in_proj_{kind}"] = torch.cat(stacked)
            tensors[f"{old}attn.out_proj.{kind}"] = text[f"{new}self_attn.out_proj.{kind}"]
            tensors[f"{old}ln_1.{kind}"] = text[f"{new}layer_norm1.{kind}"]
            tensors[f"{old}ln_2.{kind}"] = text[f"{new}layer_norm2.{kind}"]
            tensors[f"{old}mlp.c_fc.{kind}"] = text[f"{new}mlp.fc1.{kind}"]
            tensors[f"{old}mlp.c_proj.{kind}"] = text[f"{new}mlp.fc2.{kind}"]
    return {f"model.{name}": tensor.clone() for name, tensor in tensors.items()}
