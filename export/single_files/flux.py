"""Single `.safetensors` files with the transformer of FLUX.1 or FLUX.2 in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Component, Part
from ..checkpoints.weights import Weights
from .layout import Layout, outside
from .shapes import count

EMBEDDERS = {
    "context_embedder.": "txt_in.",
    "x_embedder.": "img_in.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
NAMES = EMBEDDERS | {
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
}
ATTENTION = {
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
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
}
DOUBLE = ATTENTION | {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
}
NORMS = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
SINGLE = NORMS | {
    "norm.linear.": "modulation.lin.",
    "attn.to_q.": "linear1.",
    "attn.to_k.": "linear1.",
    "attn.to_v.": "linear1.",
    "proj_mlp.": "linear1.",
    "proj_out.": "linear2.",
}
NAMES_2 = EMBEDDERS | {
    "time_guidance_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_guidance_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_guidance_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_guidance_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "double_stream_modulation_img.linear.": "double_stream_modulation_img.lin.",
    "double_stream_modulation_txt.linear.": "double_stream_modulation_txt.lin.",
    "single_stream_modulation.linear.": "single_stream_modulation.lin.",
}
DOUBLE_2 = ATTENTION | {
    "ff.linear_in.": "img_mlp.0.",
    "ff.linear_out.": "img_mlp.2.",
    "ff_context.linear_in.": "txt_mlp.0.",
    "ff_context.linear_out.": "txt_mlp.2.",
}
SINGLE_2 = NORMS | {"attn.to_qkv_mlp_proj.": "linear1.", "attn.to_out.": "linear2."}

BLOCKS = "double_blocks.0.img_attn.norm.key_norm.scale"
"""A tensor of both, and of their relatives."""


def _config(weights: Weights, prefix: str) -> dict[str, Any]:
    width, channels = weights.shape(f"{prefix}img_in.weight")
    (head,) = weights.shape(prefix + BLOCKS)
    return {
        "in_channels": channels,
        "out_channels": weights.shape(f"{prefix}final_layer.linear.weight")[0],
        "num_layers": count(weights, f"{prefix}double_blocks."),
        "num_single_layers": count(weights, f"{prefix}single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": weights.shape(f"{prefix}txt_in.weight")[1],
        "guidance_embeds": f"{prefix}guidance_in.in_layer.weight" in weights,
    }


def _config_1(weights: Weights, prefix: str) -> dict[str, Any]:
    pooled = weights.shape(f"{prefix}vector_in.in_layer.weight")[1]
    return _config(weights, prefix) | {"pooled_projection_dim": pooled}


def _config_2(weights: Weights, prefix: str) -> dict[str, Any]:
    width = weights.shape(f"{prefix}img_in.weight")[0]
    return _config(weights, prefix) | {
        "mlp_ratio": weights.shape(f"{prefix}double_blocks.0.img_mlp.2.weight")[1] / width,
        "timestep_guidance_channels": weights.shape(f"{prefix}time_in.in_layer.weight")[1],
    }


FLUX = Layout(
    "FLUX.1",
    mark="vector_in.in_layer.weight",
    config=_config_1,
    width="img_in.weight",
    names=NAMES,
    blocks={
        "transformer_blocks": ("double_blocks", DOUBLE),
        "single_transformer_blocks": ("single_blocks", SINGLE),
    },
    behind="proj_mlp.",
    swapped=outside,
)
FLUX2 = Layout(
    "FLUX.2",
    mark="double_stream_modulation_img.lin.weight",
    config=_config_2,
    width="img_in.weight",
    names=NAMES_2,
    blocks={
        "transformer_blocks": ("double_blocks", DOUBLE_2),
        "single_transformer_blocks": ("single_blocks", SINGLE_2),
    },
    swapped=outside,
)


def open_transformer(
    layout: Layout, file: Path, weights: Weights, part: Part, base: Mapping[str, Any]
) -> Component | None:
    """Open a transformer in one of the layouts, None for a file of another; `base` is the config of one of its kind.

    Raises `CheckpointError` where one of the two reads a guidance scale and the other does not: they are other models,
    with other schedules. Raises `UnsupportedModelError` for models that share the blocks alone.
    """
    component = layout.open(file, weights, part, base)
    if component is None:
        known = any(each.prefix_in(weights) is not None for each in (FLUX, FLUX2))
        if not known and any(f"{prefix}{BLOCKS}" in weights for prefix in ("", "model.diffusion_model.")):
            raise UnsupportedModelError(
                f"{file} has blocks as FLUX.1 has them and no {FLUX.mark}: it is of another model, such as Chroma, "
                "whose single files are not read; give a diffusers folder"
            )
        return None
    if base and component.config["guidance_embeds"] != bool(base.get("guidance_embeds")):
        has = ("has", "has not") if component.config["guidance_embeds"] else ("has not", "has")
        raise CheckpointError(
            f"{file} {has[0]} an embedded guidance scale and the transformer of --base {has[1]}: give the folder or "
            "hub id of the model that it was made from (FLUX.1-dev and FLUX.2-dev have one, FLUX.1-schnell and "
            "FLUX.2-klein have not)"
        )
    return component
