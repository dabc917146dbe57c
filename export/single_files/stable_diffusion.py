"""Single `.safetensors` files of the original Stable Diffusion layout, read under diffusers' names.

Sizes come from the tensors' shapes. What the file does not say is fixed by its version: 1.x has CLIP ViT-L and eight
heads everywhere, 2.x the first 23 of OpenCLIP's layers and heads of 64 channels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Component, Origin, Part, TokenizerSource
from ..checkpoints.streamed import Find
from ..checkpoints.weights import Weights
from .markers import Said, said
from .names import CLIP, OPEN_CLIP, UNET, VAE, open_clip_tensor, unet_tensor, vae_tensor

TOKENIZER = "openai/clip-vit-large-patch14"
"""Where the vocabulary, one for all versions, is fetched from when no tokenizer is given."""
OPEN_CLIP_LAYERS = 23
"""Text layers of version 2.x: the last of OpenCLIP's 24 is not used, and files written by diffusers leave it out."""
VAE_PREFIXES = (VAE, "vae.")

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
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Lin et al. 2023: the schedule that ends in pure noise, and timesteps that begin there."""

log = logging.getLogger(__name__)


def open_single_file(
    file: Path,
    weights: Weights,
    family: str,
    parts: Mapping[str, Part],
    tokenizer: Callable[[str], Path],
    prediction_type: str | None = None,
    replaced: Mapping[str, Origin] | None = None,
) -> Checkpoint | None:
    """Open a single file of this layout, None for any other; `tokenizer` turns the default hub id into a folder.

    What the U-Net predicts is `prediction_type`, else what the file says. A file of version 2.x that says nothing is
    taken for the v-prediction model at 768 pixels. `replaced` are components from somewhere else.
    """
    version = _version(file, weights)
    if version is None:
        return None
    replaced = replaced or {}
    scheduler = _scheduler(file, weights, version, prediction_type)
    is_large = version == 2 and scheduler["prediction_type"] == "v_prediction"
    unet = _read(weights, lambda weights: unet_config(weights, version)) | {"sample_size": 96 if is_large else 64}
    layers = unet["layers_per_block"]
    text: Find = (
        (lambda name: weights.get(CLIP + name.removeprefix("text_model.")))
        if version == 1
        else (lambda name: open_clip_tensor(weights, name.removeprefix("text_model.")))
    )
    components = {
        "text_encoder": Component.of(
            parts["text_encoder"],
            f"text encoder of {file}",
            _read(weights, lambda weights: text_config(weights, version)),
            weights,
            text,
        ),
        "unet": Component.of(
            parts["unet"], f"U-Net of {file}", unet, weights, lambda name: unet_tensor(weights, name, layers)
        ),
        "vae": replaced["vae"].component if "vae" in replaced else _own_vae(file, weights, parts["vae"]),
    }
    return Checkpoint(
        file.name,
        family,
        "StableDiffusionPipeline",
        components,
        tokenizers={"tokenizer": TokenizerSource(tokenizer(TOKENIZER), None if version == 1 else 0)},
        scheduler=scheduler,
        files={file.name: file} | {name: path for origin in replaced.values() for name, path in origin.files.items()},
        path=file,
        replaced=replaced,
    )


def open_vae_file(file: Path, weights: Weights, part: Part) -> Component | None:
    """Open a VAE of its own or out of a whole checkpoint, in the original or in diffusers' layout, or return None."""
    for prefix in (*VAE_PREFIXES, ""):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in weights:
            return _original_vae(f"VAE {file}", weights, part, prefix)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        return Component.of(part, f"VAE {file}", _read(weights, diffusers_vae_config), weights)
    return None


def _own_vae(file: Path, weights: Weights, part: Part) -> Component:
    for prefix in VAE_PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            return _original_vae(f"VAE of {file}", weights, part, prefix)
    raise CheckpointError(f"{file} has no VAE ({VAE}*): give one with --vae, a folder, a file or a hub id")


def _original_vae(where: str, weights: Weights, part: Part, prefix: str) -> Component:
    config = _read(weights, lambda weights: vae_config(weights, prefix))
    levels = len(config["block_out_channels"])
    return Component.of(part, where, config, weights, lambda name: vae_tensor(weights, name, levels, prefix))


def _read(weights: Weights, config: Callable[[Weights], dict[str, Any]]) -> dict[str, Any]:
    """Return a config read off shapes; raises `CheckpointError` for tensors that no file of this layout has."""
    try:
        return config(weights)
    except (IndexError, ValueError) as error:
        raise CheckpointError(
            f"{weights.files[0]} has tensors of other names or shapes than Stable Diffusion: it is of another layout"
        ) from error


def _scheduler(file: Path, weights: Weights, version: int, prediction_type: str | None) -> dict[str, Any]:
    """Return the version's scheduler config with the prediction type that is asked for, or that the file says."""
    says = said(file, weights) if prediction_type is None else Said(prediction_type, "ztsnr" in weights)
    prediction = says.prediction_type
    if prediction is None:
        prediction = "v_prediction" if version == 2 or says.zero_terminal_snr else "epsilon"
        if version == 2:
            log.warning(
                "%s does not say what it predicts: it is taken for a v-prediction model at 768 pixels; "
                "give --prediction-type epsilon if it is the base model at 512",
                file,
            )
    zero_snr = says.zero_terminal_snr and prediction == "v_prediction"
    class_name = "PNDMScheduler" if version == 1 and not zero_snr else "DDIMScheduler"
    mine = SCHEDULES | {"_class_name": class_name, "prediction_type": prediction}
    return mine | ZERO_TERMINAL_SNR if zero_snr else mine


def _version(file: Path, weights: Weights) -> int | None:
    """Return 1 or 2, by the text encoder, None for another layout; families that share its prefix are named."""
    if any(name.startswith("conditioner.") for name in weights):
        raise UnsupportedModelError(
            f"{file} is a Stable Diffusion XL checkpoint: give its diffusers folder or hub id, files of it are not read"
        )
    if UNET + "input_blocks.0.0.weight" not in weights:
        return None
    for version, prefix in ((1, CLIP), (2, OPEN_CLIP)):
        if any(name.startswith(prefix) for name in weights):
            return version
    if any(name.startswith(CLIP.removesuffix("text_model.")) for name in weights):
        raise CheckpointError(
            f"{file} names its text encoder {CLIP.removesuffix('text_model.')}* where {CLIP}* is the original layout, "
            "and diffusers does not read it either: convert it again"
        )
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


def vae_config(weights: Weights, prefix: str = VAE) -> dict[str, Any]:
    """Return diffusers' autoencoder config, read off the shapes of an original file's tensors."""
    down = f"{prefix}encoder.down."
    places = {tuple(name[len(down) :].split(".")[:3]) for name in weights if name.startswith(down)}
    levels = len({place[0] for place in places})
    return {
        "block_out_channels": [weights.shape(f"{down}{level}.block.0.conv2.weight")[0] for level in range(levels)],
        "layers_per_block": len({place for place in places if place[:2] == ("0", "block")}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": weights.shape(f"{prefix}post_quant_conv.weight")[0],
        "scaling_factor": 0.18215,
    }


def diffusers_vae_config(weights: Weights) -> dict[str, Any]:
    """Return the config of an autoencoder whose file has diffusers' names, read off the tensors' shapes."""
    down = "encoder.down_blocks."
    places = {tuple(name[len(down) :].split(".")[:3]) for name in weights if name.startswith(down)}
    levels = len({place[0] for place in places})
    return {
        "block_out_channels": [weights.shape(f"{down}{level}.resnets.0.conv2.weight")[0] for level in range(levels)],
        "layers_per_block": len({place for place in places if place[:2] == ("0", "resnets")}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": weights.shape("post_quant_conv.weight")[0],
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
    if version == 2 and layers < OPEN_CLIP_LAYERS:
        raise UnsupportedModelError(
            f"{weights.files[0]} has {layers} text layers where Stable Diffusion 2.x has {OPEN_CLIP_LAYERS}, or one "
            "more that is not used: give the diffusers folder, whose config says how many there are"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}0.{inner}")[0],
        "num_hidden_layers": layers if version == 1 else OPEN_CLIP_LAYERS,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape(prefix + positions)[0],
        "hidden_act": "quick_gelu" if version == 1 else "gelu",
    }
