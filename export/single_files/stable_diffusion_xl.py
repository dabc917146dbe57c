"""Single `.safetensors` files of the original Stable Diffusion XL layout: base and refiner, and Playground 2.5.

Sizes come from the tensors' shapes. What no shape tells is the same in all of them, and stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from ..checkpoints.checkpoint import Checkpoint, Component, Part, SingleFile, TokenizerSource
from ..checkpoints.streamed import Find
from ..checkpoints.weights import Weights
from ..networks.unet import inpaints
from .markers import chosen
from .names import UNET, open_clip_tensor
from .shapes import clip_config, open_clip_config, read, unet_config
from .stable_diffusion import SCHEDULES, TOKENIZER, ZERO_TERMINAL_SNR, own_unet
from .vae import own_vae

FIRST = "conditioner.embedders.0.transformer.text_model."
SECOND = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
"""Where the second text encoder is: beside the first, or alone in the refiner."""
SIZE = 128
"""Latent cells on each side of the pictures that it was trained with."""
SCALE = 0.13025
SIZE_IDS = {True: 6, False: 5}
"""Numbers that the U-Net reads beside the text, with the first text encoder and without: the refiner."""
EULER = SCHEDULES | {
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}
PLAYGROUND: dict[str, Any] = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 7.0,
    "num_train_timesteps": 1000,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}
"""diffusers' scheduler of a file with `edm_mean` and `edm_std`, which center the VAE's latents."""
PLAYGROUND_SCALE = 0.5


def open_single_file(source: SingleFile, family: str, parts: Mapping[str, Part]) -> Checkpoint | None:
    """Open a single file of this layout, None for any other."""
    file, weights, replaced = source.path, source.weights, source.replaced
    prefix = next((each for each in SECOND if f"{each}positional_embedding" in weights), None)
    if prefix is None or f"{UNET}label_emb.0.0.weight" not in weights:
        if any(name.startswith("conditioner.") for name in weights):
            raise CheckpointError(f"{file} has not all of {UNET}* and {SECOND[0]}*, as Stable Diffusion XL has them")
        return None
    first = f"{FIRST}embeddings.position_embedding.weight" in weights
    texts: dict[str, tuple[str, Callable[[Weights], dict[str, Any]], Find]] = {
        "text_encoder_2": (
            "second",
            lambda weights: open_clip_config(weights, prefix),
            lambda name: open_clip_tensor(weights, name.removeprefix("text_model."), prefix),
        )
    }
    if first:
        texts["text_encoder"] = (
            "first",
            lambda weights: clip_config(weights, FIRST),
            lambda name: weights.get(FIRST + name.removeprefix("text_model.")),
        )
    unet = read(weights, unet_config)
    unet |= read(weights, lambda weights: _added(weights, f"{prefix}text_projection", SIZE_IDS[first]))
    second, scale = TokenizerSource(source.tokenizer(TOKENIZER), 0), _scale(weights)
    return Checkpoint(
        file.name,
        family,
        f"StableDiffusionXL{'Inpaint' if inpaints(unet) else '' if first else 'Img2Img'}Pipeline",
        {
            name: Component.of(parts[name], f"{place} text encoder of {file}", read(weights, config), weights, find)
            for name, (place, config, find) in sorted(texts.items())
        }
        | {
            "unet": own_unet(file, weights, parts["unet"], unet),
            "vae": replaced["vae"].component if "vae" in replaced else own_vae(file, weights, parts["vae"], scale),
        },
        tokenizers=({"tokenizer": TokenizerSource(second.folder)} if first else {}) | {"tokenizer_2": second},
        scheduler=_scheduler(file, weights, source.prediction_type),
        files=source.files,
        path=file,
        replaced=replaced,
        vae_scale=scale,
        options={"force_zeros_for_empty_prompt": first, "requires_aesthetics_score": not first},
    )


def _added(weights: Weights, projection: str, numbers: int) -> dict[str, Any]:
    """Return what a U-Net's config says of the size ids and the pooled text, which come in side by side."""
    pooled = weights.shape(projection)[1]
    width = weights.shape(f"{UNET}label_emb.0.0.weight")[1]
    if width <= pooled or (width - pooled) % numbers:
        raise ValueError(f"{width} numbers are no {pooled} of a text and {numbers} size ids")
    return {
        "sample_size": SIZE,
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": width,
        "addition_time_embed_dim": (width - pooled) // numbers,
    }


def _scale(weights: Weights) -> dict[str, Any]:
    """Return what a VAE's config says of the latents' size."""
    if not _is_playground(weights):
        return {"scaling_factor": SCALE}
    mean, deviation = (weights.raw(name).flatten().tolist() for name in ("edm_mean", "edm_std"))
    return {"scaling_factor": PLAYGROUND_SCALE, "latents_mean": mean, "latents_std": deviation}


def _scheduler(file: Path, weights: Weights, prediction_type: str | None) -> dict[str, Any]:
    says = chosen(file, weights, prediction_type)
    if _is_playground(weights):
        return PLAYGROUND | {"prediction_type": says.prediction_type or "epsilon"}
    prediction = says.prediction_type or ("v_prediction" if says.zero_terminal_snr else "epsilon")
    zero_snr = says.zero_terminal_snr and prediction == "v_prediction"
    return EULER | {"prediction_type": prediction} | (ZERO_TERMINAL_SNR if zero_snr else {})


def _is_playground(weights: Weights) -> bool:
    return "edm_mean" in weights and "edm_std" in weights
