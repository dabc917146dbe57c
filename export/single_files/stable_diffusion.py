"""Single `.safetensors` files of the original Stable Diffusion layout, read under diffusers' names.

Sizes come from the tensors' shapes. What the file does not say is fixed by its version: 1.x has CLIP ViT-L and eight
heads everywhere, 2.x the first 23 of OpenCLIP's layers and heads of 64 channels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Component, Part, SingleFile, TokenizerSource
from ..checkpoints.streamed import Find
from ..checkpoints.weights import Weights
from ..networks.unet import inpaints
from .markers import chosen
from .names import CLIP, OPEN_CLIP, UNET, open_clip_tensor, unet_names, unet_tensor
from .shapes import clip_config, open_clip_config, read, unet_config
from .vae import own_vae

TOKENIZER = "openai/clip-vit-large-patch14"
"""Where the vocabulary, one for all versions, is fetched from when no tokenizer is given."""
OPEN_CLIP_LAYERS = 23
"""Text layers of version 2.x: the last of OpenCLIP's 24 is not used, and files written by diffusers leave it out."""

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


def open_single_file(source: SingleFile, family: str, parts: Mapping[str, Part]) -> Checkpoint | None:
    """Open a single file of this layout, None for any other.

    What the U-Net predicts is what was asked for, else what the file says. A file of version 2.x that says nothing is
    taken for the v-prediction model at 768 pixels.
    """
    file, weights, replaced = source.path, source.weights, source.replaced
    version = _version(file, weights)
    if version is None:
        return None
    scheduler = _scheduler(file, weights, version, source.prediction_type)
    is_large = version == 2 and scheduler["prediction_type"] == "v_prediction"
    unet = read(weights, lambda weights: _unet_config(weights, version)) | {"sample_size": 96 if is_large else 64}
    text: Find = (
        (lambda name: weights.get(CLIP + name.removeprefix("text_model.")))
        if version == 1
        else (lambda name: open_clip_tensor(weights, name.removeprefix("text_model.")))
    )
    components = {
        "text_encoder": Component.of(
            parts["text_encoder"],
            f"text encoder of {file}",
            read(weights, lambda weights: text_config(weights, version)),
            weights,
            text,
        ),
        "unet": own_unet(file, weights, parts["unet"], unet),
        "vae": replaced["vae"].component if "vae" in replaced else own_vae(file, weights, parts["vae"]),
    }
    return Checkpoint(
        file.name,
        family,
        "StableDiffusionInpaintPipeline" if inpaints(unet) else "StableDiffusionPipeline",
        components,
        tokenizers={"tokenizer": TokenizerSource(source.tokenizer(TOKENIZER), None if version == 1 else 0)},
        scheduler=scheduler,
        files=source.files,
        path=file,
        replaced=replaced,
    )


def _scheduler(file: Path, weights: Weights, version: int, prediction_type: str | None) -> dict[str, Any]:
    """Return the version's scheduler config with the prediction type that is asked for, or that the file says."""
    says = chosen(file, weights, prediction_type)
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


def own_unet(file: Path, weights: Weights, part: Part, config: dict[str, Any]) -> Component:
    """Open the U-Net of a file, of which every tensor is to be read."""
    layers = config["layers_per_block"]
    names = unet_names(weights)
    return Component.of(
        part, f"U-Net of {file}", config, weights, lambda name: unet_tensor(weights, name, layers), names
    )


def _version(file: Path, weights: Weights) -> int | None:
    """Return 1 or 2, by the text encoder, None for another layout."""
    if UNET + "input_blocks.0.0.weight" not in weights or any(name.startswith("conditioner.") for name in weights):
        return None
    for version, prefix in ((1, CLIP), (2, OPEN_CLIP)):
        if any(name.startswith(prefix) for name in weights):
            if f"{UNET}label_emb.0.0.weight" in weights:
                raise UnsupportedModelError(
                    f"{file} has {UNET}label_emb.*, which reads a picture, as Stable unCLIP does: it is not supported, "
                    "use the ordinary checkpoint"
                )
            return version
    if any(name.startswith(CLIP.removesuffix("text_model.")) for name in weights):
        raise CheckpointError(
            f"{file} names its text encoder {CLIP.removesuffix('text_model.')}* where {CLIP}* is the original layout, "
            "and diffusers does not read it either: convert it again"
        )
    raise CheckpointError(f"{file} has no text encoder ({CLIP}* or {OPEN_CLIP}*): give a full checkpoint")


def _unet_config(weights: Weights, version: int) -> dict[str, Any]:
    """Return the U-Net's config; version 1 has eight heads of any width."""
    config = unet_config(weights)
    if set(config.pop("transformer_layers_per_block")) != {1}:
        raise UnsupportedModelError(
            f"{weights.files[0]} has deeper transformer blocks than Stable Diffusion 1.x and 2.x"
        )
    return config | ({"attention_head_dim": 8} if version == 1 else {})


def text_config(weights: Weights, version: int) -> dict[str, Any]:
    """Return the config of the CLIP text model, read off the tensors' shapes."""
    if version == 1:
        return clip_config(weights, CLIP)
    config = open_clip_config(weights, OPEN_CLIP)
    if (layers := config["num_hidden_layers"]) < OPEN_CLIP_LAYERS:
        raise UnsupportedModelError(
            f"{weights.files[0]} has {layers} text layers where Stable Diffusion 2.x has {OPEN_CLIP_LAYERS}, or one "
            "more that is not used: give the diffusers folder, whose config says how many there are"
        )
    return config | {"num_hidden_layers": OPEN_CLIP_LAYERS}
