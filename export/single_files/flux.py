"""Single `.safetensors` files with the transformer of FLUX.1 in the original layout, read under diffusers' names.

Its text encoders, VAE, tokenizers and scheduler come from somewhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Component, Part
from ..checkpoints.weights import Weights
from .shapes import count, read

PREFIXES = ("", "model.diffusion_model.")
MARK = "double_blocks.0.img_attn.norm.key_norm.scale"

NAMES = {
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "context_embedder.": "txt_in.",
    "x_embedder.": "img_in.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
DOUBLE = {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "attn.to_q.": "img_attn.qkv.",
    "attn.to_k.": "img_attn.qkv.",
    "attn.to_v.": "img_attn.qkv.",
    "attn.add_q_proj.": "txt_attn.qkv.",
    "attn.add_k_proj.": "txt_attn.qkv.",
    "attn.add_v_proj.": "txt_attn.qkv.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
}
SINGLE = {
    "norm.linear.": "modulation.lin.",
    "attn.to_q.": "linear1.",
    "attn.to_k.": "linear1.",
    "attn.to_v.": "linear1.",
    "proj_mlp.": "linear1.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out.": "linear2.",
}
"""Original names by diffusers', whole or by how they begin; some tensors hold several of diffusers'."""
BLOCKS = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}
PLACES = {"q": 0, "k": 1, "v": 2}


def open_transformer(file: Path, weights: Weights, part: Part, base: Mapping[str, Any]) -> Component | None:
    """Open a transformer in the original layout, None for any other file; `base` is the config of one of its kind.

    What shapes tell of its config is theirs, the rest is the base's. Raises `CheckpointError` where one of the two
    reads a guidance scale and the other does not: their schedules are not the same. Raises `UnsupportedModelError` for
    models that share the blocks alone.
    """
    prefix = next((each for each in PREFIXES if f"{each}{MARK}" in weights), None)
    if prefix is None:
        return None
    if f"{prefix}vector_in.in_layer.weight" not in weights:
        raise UnsupportedModelError(
            f"{file} has blocks as FLUX.1 has them and no {prefix}vector_in.in_layer.weight: it is of another model, "
            "such as Chroma or FLUX.2, whose single files are not read; give a diffusers folder"
        )
    config = read(weights, lambda weights: _config(weights, prefix), "FLUX.1")
    component = Component.of(
        part, f"transformer of {file}", {**base, **config}, weights, lambda name: _tensor(weights, name, prefix)
    )
    if base and config["guidance_embeds"] != bool(base.get("guidance_embeds")):
        has = ("has", "has not") if config["guidance_embeds"] else ("has not", "has")
        raise CheckpointError(
            f"{file} {has[0]} an embedded guidance scale and the transformer of --base {has[1]}: give the folder or "
            "hub id of the model that it was made from (FLUX.1-dev has one, FLUX.1-schnell has not)"
        )
    return component


def _config(weights: Weights, prefix: str) -> dict[str, Any]:
    width = weights.shape(f"{prefix}img_in.weight")[0]
    (head,) = weights.shape(f"{prefix}{MARK}")
    return {
        "in_channels": weights.shape(f"{prefix}img_in.weight")[1],
        "out_channels": weights.shape(f"{prefix}final_layer.linear.weight")[0],
        "num_layers": count(weights, f"{prefix}double_blocks."),
        "num_single_layers": count(weights, f"{prefix}single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": weights.shape(f"{prefix}txt_in.weight")[1],
        "pooled_projection_dim": weights.shape(f"{prefix}vector_in.in_layer.weight")[1],
        "guidance_embeds": f"{prefix}guidance_in.in_layer.weight" in weights,
    }


def _tensor(weights: Weights, name: str, prefix: str) -> torch.Tensor | None:
    """Return a parameter by diffusers' name for it."""
    block = re.match(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.", name)
    stack, names = BLOCKS[block[1]] if block else ("", NAMES)
    own = name[block.end() :] if block else name
    new = next((each for each in names if own.startswith(each)), None)
    if new is None:
        return None
    original = names[new] + own.removeprefix(new)
    tensor = weights.get(prefix + (f"{stack}.{block[2]}.{original}" if block else original))
    if tensor is None:
        return None
    if own.startswith("norm_out."):  # scale and shift are the other way round
        return torch.cat(tensor.chunk(2)[::-1])
    if not (stacked := re.search(r"\.(?:to|add)_([qkv])[._]", own)) and not own.startswith("proj_mlp."):
        return tensor
    width = weights.shape(f"{prefix}img_in.weight")[0]
    if stacked is None:
        return tensor[3 * width :]
    return tensor[PLACES[stacked[1]] * width :][:width]
