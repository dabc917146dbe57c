"""Diffusers folders of an architecture, with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...engines.errors import RequestError
from .architectures import SMALL, Architecture, Config, Network, Stored
from .large import LARGE
from .tokenizers import WRITERS
from .weights import write_random_weights

ARCHITECTURES: dict[str, Architecture] = SMALL | LARGE


def architecture(name: str) -> Architecture:
    """Return the architecture called `name`, or raise `RequestError`."""
    if name not in ARCHITECTURES:
        raise RequestError(f"unknown architecture {name!r}: choose {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def write_random_checkpoint(
    family: str,
    out: str | Path,
    *,
    seed: int = 0,
    precision: Stored | None = None,
    networks: Sequence[str] | None = None,
) -> Path:
    """Write a diffusers folder of an architecture with random weights and return it.

    `sd21` predicts v and has OpenCLIP's text encoder; `shallow-sd15` has the full width and the fewest layers; `tiny-*`
    have the same parts with few weights, `tiny-sd21` as many levels as the full models. `precision` is by default what
    the architecture is published in. Of the folders in `networks` alone the weights are written, by default of all.
    Raises `RequestError` for an architecture that there is not, and for a path at which there is something.
    """
    out, known = Path(out), architecture(family)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already: name a folder that is not, or an empty one")
    sizes = {name: WRITERS[kind](out / name) for name, kind in known.tokenizers.items()}
    for name, network in known.networks.items():
        if network.config_kind == "CLIPTextConfig" and network.library == "transformers":
            network = _with_words(network, sizes[name.replace("text_encoder", "tokenizer")], known, name)
        (out / name).mkdir()
        _write_json(out / name / "config.json", _described(network))
        if networks is None or name in networks:
            stem = "model" if network.library == "transformers" else "diffusion_pytorch_model"
            file = out / name / f"{stem}.safetensors"
            write_random_weights(file, shapes(network), tables(network), seed=seed, precision=precision or known.stored)
    kind, config = known.scheduler
    (out / "scheduler").mkdir()
    _write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": kind} | config)
    index = {"_class_name": known.pipeline, **known.index, "scheduler": ["diffusers", kind]}
    index |= {name: ["transformers", TOKENIZERS[kind]] for name, kind in known.tokenizers.items()}
    index |= {name: [network.library, network.kind] for name, network in known.networks.items()}
    _write_json(out / "model_index.json", index)
    return out


TOKENIZERS = {
    "clip": "CLIPTokenizer",
    "clip!": "CLIPTokenizer",
    "t5": "T5TokenizerFast",
    "qwen": "Qwen2TokenizerFast",
}


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's weights by name, without making any."""
    with torch.device("meta"):
        module = _module(network)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def tables(network: Network) -> dict[str, torch.Tensor]:
    """Return what a network's class computes and stores beside its weights, by name: Stable Diffusion 3's positions."""
    if network.kind != "SD3Transformer2DModel":
        return {}
    from diffusers.models.embeddings import PatchEmbed

    given, side = network.config, network.config["sample_size"]
    width = given["num_attention_heads"] * given["attention_head_dim"]
    positions = PatchEmbed(
        side, side, given.get("patch_size", 2), embed_dim=width, pos_embed_max_size=given["pos_embed_max_size"]
    ).pos_embed
    return {"pos_embed.pos_embed": positions}


def weight_count(known: Architecture) -> int:
    """Return how many weights an architecture has."""
    return sum(math.prod(shape) for network in known.networks.values() for shape in shapes(network).values())


def _module(network: Network) -> torch.nn.Module:
    if network.library == "diffusers":
        import diffusers

        made: torch.nn.Module = getattr(diffusers, network.kind)(**network.config)
    else:
        import transformers

        made = getattr(transformers, network.kind)(getattr(transformers, network.config_kind)(**network.config))
    return made


def _described(network: Network) -> Config:
    """Return what the network's `config.json` says."""
    if network.library == "diffusers":
        return {"_class_name": network.kind} | network.config
    import transformers

    kind = getattr(transformers, network.config_kind).model_type
    return {"model_type": kind, "architectures": [network.kind]} | network.config


def _with_words(network: Network, size: int, known: Architecture, name: str) -> Network:
    """Return a CLIP encoder that ends and pads as its tokenizer does."""
    padded = known.tokenizers[name.replace("text_encoder", "tokenizer")] == "clip!"
    words = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0 if padded else size - 1}
    if known.small_vocabulary:
        words["vocab_size"] = size
    return Network(network.library, network.kind, network.config | words)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
