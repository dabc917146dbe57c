"""Single `.safetensors` files with the transformer of Z-Image in the original layout."""

from __future__ import annotations

from typing import Any

from ..checkpoints.weights import Weights
from .layout import Layout
from .shapes import count

SIDE = 2
"""Of the squares of latents that are tokens."""
INSIDE = {
    "attention.to_q.": "attention.qkv.",
    "attention.to_k.": "attention.qkv.",
    "attention.to_v.": "attention.qkv.",
    "attention.to_out.0.": "attention.out.",
    "attention.norm_q.": "attention.q_norm.",
    "attention.norm_k.": "attention.k_norm.",
}


def _config(weights: Weights, prefix: str) -> dict[str, Any]:
    width, square = weights.shape(f"{prefix}x_embedder.weight")
    (head,) = weights.shape(f"{prefix}layers.0.attention.q_norm.weight")
    return {
        "in_channels": square // SIDE**2,
        "dim": width,
        "n_layers": count(weights, f"{prefix}layers."),
        "n_refiner_layers": count(weights, f"{prefix}noise_refiner."),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": weights.shape(f"{prefix}cap_embedder.0.weight")[0],
    }


Z_IMAGE = Layout(
    "Z-Image",
    mark="noise_refiner.0.attention.qkv.weight",
    config=_config,
    width="x_embedder.weight",
    names={"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."},
    blocks={name: (name, INSIDE) for name in ("layers", "noise_refiner", "context_refiner")},
    left=("norm_final.weight",),  # which diffusers leaves out too
)
