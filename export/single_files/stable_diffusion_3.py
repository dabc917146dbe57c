"""Single `.safetensors` files with the transformer of Stable Diffusion 3 or 3.5 in the original layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..checkpoints.weights import Weights
from .layout import Layout, outside
from .shapes import count

MARK = "joint_blocks.0.x_block.attn.qkv.weight"
NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
INSIDE = {
    "attn.to_q.": "x_block.attn.qkv.",
    "attn.to_k.": "x_block.attn.qkv.",
    "attn.to_v.": "x_block.attn.qkv.",
    "attn.add_q_proj.": "context_block.attn.qkv.",
    "attn.add_k_proj.": "context_block.attn.qkv.",
    "attn.add_v_proj.": "context_block.attn.qkv.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn2.to_q.": "x_block.attn2.qkv.",
    "attn2.to_k.": "x_block.attn2.qkv.",
    "attn2.to_v.": "x_block.attn2.qkv.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}


def _config(weights: Weights, prefix: str) -> dict[str, Any]:
    width, channels, side, _ = weights.shape(f"{prefix}x_embedder.proj.weight")
    layers = count(weights, f"{prefix}joint_blocks.")
    block = f"{prefix}joint_blocks.{{}}.x_block."
    inner, text = weights.shape(f"{prefix}context_embedder.weight")
    normed = f"{block.format(0)}attn.ln_q.weight"
    heads: dict[str, Any] = {"qk_norm": None}  # their number is the base's, which no shape tells
    if normed in weights:
        (head,) = weights.shape(normed)
        heads = {"qk_norm": "rms_norm", "attention_head_dim": head, "num_attention_heads": width // head}
    return heads | {
        "patch_size": side,
        "in_channels": channels,
        "out_channels": weights.shape(f"{prefix}final_layer.linear.weight")[0] // side**2,
        "num_layers": layers,
        "joint_attention_dim": text,
        "caption_projection_dim": inner,
        "pooled_projection_dim": weights.shape(f"{prefix}y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": math.isqrt(weights.shape(f"{prefix}pos_embed")[1]),
        "dual_attention_layers": [n for n in range(layers) if f"{block.format(n)}attn2.qkv.weight" in weights],
    }


def _swapped(name: str, block: int | None, config: Mapping[str, Any]) -> bool:
    """Tell whether scale and shift are the other way round: of the last norm, and the last block's for texts."""
    last = block is not None and block == config["num_layers"] - 1
    return outside(name, block, config) or (last and name.startswith("norm1_context."))


SD3 = Layout(
    "Stable Diffusion 3",
    mark=MARK,
    config=_config,
    width="x_embedder.proj.weight",
    names=NAMES,
    blocks={"transformer_blocks": ("joint_blocks", INSIDE)},
    swapped=_swapped,
    left=("pos_embed",),  # a table of sines, which is made anew
)
