"""The original names of Stable Diffusion's parameters, and its tensors under the names that diffusers gives them."""

from __future__ import annotations

import re

import torch

from ..checkpoints.weights import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."


def original_unet_name(name: str, layers: int) -> str:
    """Return the original name of one of diffusers' U-Net parameters; `layers` is `layers_per_block`.

    An upsampler comes third in its block, after the attention; in a level without attention it comes second.
    """
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
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


def unet_tensor(weights: Weights, name: str, layers: int) -> torch.Tensor | None:
    """Return a U-Net parameter by diffusers' name for it."""
    original = UNET + original_unet_name(name, layers)
    if ".upsamplers." in name and original not in weights:
        original = original.replace(".2.conv.", ".1.conv.")
    return weights.get(original)


def unet_names(weights: Weights) -> frozenset[str]:
    """Return the names of a U-Net's tensors in a file."""
    return frozenset(name for name in weights if name.startswith(UNET))


def vae_tensor(weights: Weights, name: str, levels: int, prefix: str = VAE) -> torch.Tensor | None:
    """Return an autoencoder parameter by diffusers' name for it; `prefix` begins its names in the file."""
    tensor = weights.get(prefix + original_vae_name(name, levels))
    is_linear = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)  # in the original these are 1×1 convolutions
    return tensor.flatten(1) if tensor is not None and is_linear else tensor


def open_clip_tensor(weights: Weights, name: str, prefix: str = OPEN_CLIP) -> torch.Tensor | None:
    """Return a CLIP parameter from OpenCLIP's names, where query, key and value are stacked in one tensor."""
    if name == "text_projection.weight":
        stacked = weights.get(f"{prefix}text_projection")
        return None if stacked is None else stacked.T
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
        stacked = weights.get(prefix + name.replace(match[0], ".in_proj_"))
        return None if stacked is None else stacked.chunk(3)["qkv".index(match[1])]
    return weights.get(prefix + name)
