"""Configs of networks in the original layouts, read off the shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...engines.errors import CheckpointError
from ..checkpoints.weights import Weights
from .names import UNET

HEAD = 64
"""Channels of an attention head, in all networks but the U-Net of version 1.x."""


def read(
    weights: Weights, config: Callable[[Weights], dict[str, Any]], title: str = "Stable Diffusion"
) -> dict[str, Any]:
    """Return a config read off shapes; raises `CheckpointError` for tensors that no file of this layout has."""
    try:
        return config(weights)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{weights.files[0]} has tensors of other names or shapes than {title}: it is of another layout"
        ) from error


def count(weights: Weights, prefix: str) -> int:
    """Return how many different words follow a prefix of names: the layers of a stack."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def unet_config(weights: Weights) -> dict[str, Any]:
    """Return diffusers' config of a U-Net whose attention has heads of 64 channels."""
    blocks = f"{UNET}input_blocks."
    halvings = sorted(
        int(m[1]) for m in (re.fullmatch(rf"{re.escape(blocks)}(\d+)\.0\.op\.weight", n) for n in weights) if m
    )
    number = 1 + max(int(name[len(blocks) :].split(".")[0]) for name in weights if name.startswith(blocks))
    layers = (halvings[0] if halvings else number) - 1
    firsts = range(1, number, layers + 1)
    channels = [weights.shape(f"{blocks}{first}.0.out_layers.3.weight")[0] for first in firsts]
    depths = [count(weights, f"{blocks}{first}.1.transformer_blocks.") for first in firsts]
    middle = f"{UNET}middle_block.1."
    return {
        "in_channels": weights.shape(f"{blocks}0.0.weight")[1],
        "out_channels": weights.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # the last level's is also the middle's
        "transformer_layers_per_block": [
            *(depth or 1 for depth in depths[:-1]),
            count(weights, f"{middle}transformer_blocks."),
        ],
        "cross_attention_dim": weights.shape(f"{middle}transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": [max(1, width // HEAD) for width in channels],
        "use_linear_projection": len(weights.shape(f"{middle}proj_in.weight")) == 2,
    }


CLIP_NAMES = {
    "words": "embeddings.token_embedding.weight",
    "places": "embeddings.position_embedding.weight",
    "layers": "encoder.layers.",
    "wide": "mlp.fc1.weight",
}
OPEN_CLIP_NAMES = {
    "words": "token_embedding.weight",
    "places": "positional_embedding",
    "layers": "transformer.resblocks.",
    "wide": "mlp.c_fc.weight",
}
"""What tells the sizes of a CLIP text model, by transformers' names and by OpenCLIP's."""


def clip_config(weights: Weights, prefix: str) -> dict[str, Any]:
    """Return the config of a CLIP text model under transformers' names, CLIP's own activation in it."""
    return _text_config(weights, prefix, CLIP_NAMES) | {"hidden_act": "quick_gelu"}


def open_clip_config(weights: Weights, prefix: str) -> dict[str, Any]:
    """Return the config of a CLIP text model under OpenCLIP's names, with its projection where there is one."""
    config, projection = _text_config(weights, prefix, OPEN_CLIP_NAMES), f"{prefix}text_projection"
    projected = {"projection_dim": weights.shape(projection)[1]} if projection in weights else {}
    return config | {"hidden_act": "gelu"} | projected


def _text_config(weights: Weights, prefix: str, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what sizes tell; begin and end are the last two ids of CLIP's vocabulary."""
    layers = f"{prefix}{names['layers']}"
    vocabulary, width = weights.shape(prefix + names["words"])
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layers}0.{names['wide']}")[0],
        "num_hidden_layers": count(weights, layers),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": weights.shape(prefix + names["places"])[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
