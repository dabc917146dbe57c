"""Single `.safetensors` files of the original Stable Diffusion layout, read under diffusers' names.

Sizes come from the tensors' shapes. What the file does not say is fixed by its version: 1.x has CLIP ViT-L and eight
heads everywhere, 2.x OpenCLIP (its last layer unused) and heads of 64 channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Component, Part, TokenizerSource
from ..checkpoints.weights import Find, Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
TOKENIZER = "openai/clip-vit-large-patch14"
"""Where the vocabulary, one for all versions, is fetched from when no tokenizer is given."""

SCHEDULES: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}


def open_single_file(
    file: Path,
    weights: Weights,
    family: str,
    parts: Mapping[str, Part],
    tokenizer: Callable[[str], Path],
    prediction_type: str | None = None,
) -> Checkpoint | None:
    """Open a single file of this layout, None for any other; `tokenizer` turns the default hub id into a folder.

    Version 2.x is taken for the v-prediction model at 768 pixels unless `prediction_type` says `epsilon` (512 pixels).
    """
    version = _version(file, weights)
    if version is None:
        return None
    prediction = prediction_type or ("epsilon" if version == 1 else "v_prediction")
    sample_size = 96 if version == 2 and prediction == "v_prediction" else 64
    unet = unet_config(weights, version) | {"sample_size": sample_size}
    vae = vae_config(weights)
    layers, levels = unet["layers_per_block"], len(vae["block_out_channels"])
    text: Find = (
        (lambda name: weights.get(CLIP + name.removeprefix("text_model.")))
        if version == 1
        else (lambda name: _open_clip_tensor(weights, name.removeprefix("text_model.")))
    )
    found: dict[str, tuple[str, dict[str, Any], Find]] = {
        "text_encoder": ("text encoder", text_config(weights, version), text),
        "unet": ("U-Net", unet, lambda name: _unet_tensor(weights, name, layers)),
        "vae": ("VAE", vae, lambda name: _vae_tensor(weights, name, levels)),
    }
    return Checkpoint(
        file.name,
        family,
        "StableDiffusionPipeline",
        {
            component: Component.of(parts[component], f"{title} of {file}", config, weights, find)
            for component, (title, config, find) in found.items()
        },
        tokenizers={"tokenizer": TokenizerSource(tokenizer(TOKENIZER), None if version == 1 else 0)},
        scheduler=SCHEDULES
        | {"_class_name": "PNDMScheduler" if version == 1 else "DDIMScheduler", "prediction_type": prediction},
        files={file.name: file},
    )


def _version(file: Path, weights: Weights) -> int | None:
    """Return 1 or 2, by the text encoder, None for another layout; families that share its prefix are named."""
    if any(name.startswith("conditioner.") for name in weights):
        raise UnsupportedModelError(f"{file} is a Stable Diffusion XL checkpoint: versions 1.x and 2.x are supported")
    if UNET + "input_blocks.0.0.weight" not in weights:
        return None
    for version, prefix in ((1, CLIP), (2, OPEN_CLIP)):
        if any(name.startswith(prefix) for name in weights):
            return version
    raise CheckpointError(f"{file} has no text encoder ({CLIP}* or {OPEN_CLIP}*): give a full checkpoint")


def unet_config(weights: Weights, version: int) -> dict[str, Any]:
    """Return diffusers' U-Net config, read off the tensors' shapes."""
    blocks = f"{UNET}input_blocks."
    halvings = sorted(
        int(m[1]) for m in (re.fullmatch(rf"{re.escape(blocks)}(\d+)\.0\.op\.weight", n) for n in weights) if m
    )
    count = 1 + max(int(name[len(blocks) :].split(".")[0]) for name in weights if name.startswith(blocks))
    layers = (halvings[0] if halvings else count) - 1
    firsts = range(1, count, layers + 1)
    channels = [weights.shape(f"{blocks}{first}.0.out_layers.3.weight")[0] for first in firsts]
    attends = [f"{blocks}{first}.1.norm.weight" in weights for first in firsts]
    middle = f"{UNET}middle_block.1."
    if f"{middle}transformer_blocks.1.norm1.weight" in weights:
        raise UnsupportedModelError(
            f"{weights.files[0]} has deeper transformer blocks than Stable Diffusion 1.x and 2.x"
        )
    return {
        "in_channels": weights.shape(f"{blocks}0.0.weight")[1],
        "out_channels": weights.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": weights.shape(f"{middle}transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": 8 if version == 1 else [max(1, width // 64) for width in channels],
        "use_linear_projection": len(weights.shape(f"{middle}proj_in.weight")) == 2,
    }


def vae_config(weights: Weights) -> dict[str, Any]:
    """Return diffusers' autoencoder config, read off the tensors' shapes."""
    down = f"{VAE}encoder.down."
    places = {tuple(name[len(down) :].split(".")[:3]) for name in weights if name.startswith(down)}
    levels = len({place[0] for place in places})
    return {
        "block_out_channels": [weights.shape(f"{down}{level}.block.0.conv2.weight")[0] for level in range(levels)],
        "layers_per_block": len({place for place in places if place[:2] == ("0", "block")}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": weights.shape(f"{VAE}post_quant_conv.weight")[0],
        "scaling_factor": 0.18215,
    }


def text_config(weights: Weights, version: int) -> dict[str, Any]:
    """Return the config of the CLIP text model, read off the tensors' shapes."""
    if version == 1:
        prefix, layer, inner = f"{CLIP}embeddings.", f"{CLIP}encoder.layers.", "mlp.fc1.weight"
        tokens, positions = "token_embedding.weight", "position_embedding.weight"
    else:
        prefix, layer, inner = OPEN_CLIP, f"{OPEN_CLIP}transformer.resblocks.", "mlp.c_fc.weight"
        tokens, positions = "token_embedding.weight", "positional_embedding"
    vocabulary, width = weights.shape(prefix + tokens)
    layers = len({name[len(layer) :].split(".")[0] for name in weights if name.startswith(layer)})
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}0.{inner}")[0],
        "num_hidden_layers": layers if version == 1 else layers - 1,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape(prefix + positions)[0],
        "hidden_act": "quick_gelu" if version == 1 else "gelu",
    }


def original_unet_name(name: str, layers: int) -> str:
    """Return the original name of one of diffusers' U-Net parameters; `layers` is `layers_per_block`.

    An upsampler comes third in its block, after the attention; in a level without attention it comes second.
    """
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for new, old in fixed.items():
        name = name.replace(new + ".", old + ".", 1) if name.startswith(new + ".") else name
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(conv\.)?", name):
        way, level, kind, place = match[1], int(match[2]), match[3], int(match[4])
        rest = name[match.end() :]
        if way == "down":
            index = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else place)
            inside = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            name = f"input_blocks.{index}.{inside}.{rest}"
        else:
            index = level * (layers + 1) + (layers if kind == "upsamplers" else place)
            inside = {"resnets": "0", "attentions": "1", "upsamplers": "2.conv"}[kind]
            name = f"output_blocks.{index}.{inside}.{rest}"
    for new, old in {
        ".norm1.": ".in_layers.0.",
        ".conv1.": ".in_layers.2.",
        ".time_emb_proj.": ".emb_layers.1.",
        ".norm2.": ".out_layers.0.",
        ".conv2.": ".out_layers.3.",
        ".conv_shortcut.": ".skip_connection.",
    }.items():
        if ".transformer_blocks." not in name:
            name = name.replace(new, old)
    return name


def original_vae_name(name: str, levels: int) -> str:
    """Return the original name of one of diffusers' autoencoder parameters; `levels` counts its resolutions."""
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", name)
    for new, old in {
        ".resnets.": ".block.",
        ".downsamplers.0.": ".downsample.",
        ".upsamplers.0.": ".upsample.",
        ".conv_shortcut.": ".nin_shortcut.",
        ".conv_norm_out.": ".norm_out.",
        ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
        ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
        ".mid_block.attentions.0.to_": ".mid.attn_1.",
    }.items():
        name = name.replace(new, old)
    return name


def _unet_tensor(weights: Weights, name: str, layers: int) -> torch.Tensor | None:
    original = UNET + original_unet_name(name, layers)
    if ".upsamplers." in name and original not in weights:
        original = original.replace(".2.conv.", ".1.conv.")
    return weights.get(original)


def _vae_tensor(weights: Weights, name: str, levels: int) -> torch.Tensor | None:
    tensor = weights.get(VAE + original_vae_name(name, levels))
    is_linear = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)  # in the original these are 1×1 convolutions
    return tensor.flatten(1) if tensor is not None and is_linear else tensor


def _open_clip_tensor(weights: Weights, name: str) -> torch.Tensor | None:
    """Return a CLIP parameter from OpenCLIP's names, where query, key and value are stacked in one tensor."""
    name = name.replace("encoder.layers.", "transformer.resblocks.")
    for new, old in {
        "embeddings.token_embedding.": "token_embedding.",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        ".layer_norm1.": ".ln_1.",
        ".layer_norm2.": ".ln_2.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
        ".self_attn.": ".attn.",
    }.items():
        name = name.replace(new, old)
    if match := re.search(r"\.(q|k|v)_proj\.", name):
        stacked = weights.get(OPEN_CLIP + name.replace(match[0], ".in_proj_"))
        return None if stacked is None else stacked.chunk(3)["qkv".index(match[1])]
    return weights.get(OPEN_CLIP + name)
