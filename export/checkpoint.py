"""A checkpoint of the Stable Diffusion family, opened: three networks, a tokenizer, a scheduler config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engines.errors import CheckpointError, UnsupportedModelError
from .weights import Find, Weights, load_module

ORDINARY_UNET = {  # config keys that change what a U-Net takes in, with the values that leave it alone
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": (None, "default"),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (None, False),
}


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config, completed with its class's defaults, and its weights.

    `find` returns a weight by diffusers' name for it; the default is that files use the same names.
    """

    where: str
    config: Mapping[str, Any]
    weights: Weights
    find: Find

    @classmethod
    def of(
        cls, part: str, where: str, config: Mapping[str, Any], weights: Weights, find: Find | None = None
    ) -> Component:
        """Return the component called `part` in a diffusers folder."""
        parameters = inspect.signature(_configured(part)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return cls(where, defaults | dict(config), weights, find or weights.get)

    def load(self, build: Callable[[], torch.nn.Module], *rename: Callable[[str], str]) -> torch.nn.Module:
        """Build the network with its weights; `rename` gives other names that a weight may have."""

        def find(name: str) -> torch.Tensor | None:
            names = [name, *(other(name) for other in rename)]
            return next((tensor for tensor in map(self.find, names) if tensor is not None), None)

        try:
            return load_module(build, find, self.where)
        finally:
            self.weights.close()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; weights are read when a network is loaded."""

    name: str
    text_encoder: Component
    unet: Component
    vae: Component
    tokenizer: Path
    scheduler: Mapping[str, Any]
    files: Mapping[str, Path]
    """Weight files by the name that the bundle records."""
    revision: str | None = None
    pad_id: int | None = None
    """The padding token, where it is not the tokenizer's own."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of a request that the bundle's manifest gets, where they are not the usual ones."""

    def check(self) -> None:
        """Raise `UnsupportedModelError` for an architecture whose graphs would not fit the contracts."""
        unet, vae = self.unet.config, self.vae.config
        for key, ordinary in ORDINARY_UNET.items():
            if unet.get(key) not in ordinary:
                raise UnsupportedModelError(
                    f"{self.unet.where}: U-Net option {key}={unet[key]!r} is not supported; "
                    "Stable Diffusion 1.x and 2.x text-to-image checkpoints are"
                )
        latent, channels = vae["latent_channels"], (unet["in_channels"], unet["out_channels"])
        if channels != (latent, latent):
            raise UnsupportedModelError(
                f"{self.unet.where}: the U-Net takes {channels[0]} and gives {channels[1]} channels where the VAE has "
                f"{latent}: inpainting, depth and upscaling checkpoints are not supported, use the ordinary one"
            )
        width = self.text_encoder.config["hidden_size"]
        if width != unet["cross_attention_dim"]:
            raise CheckpointError(
                f"{self.unet.where}: cross_attention_dim is {unet['cross_attention_dim']!r} where the text encoder "
                f"gives {width}: the parts belong to different checkpoints"
            )

    def load_text_encoder(self) -> torch.nn.Module:
        """Return the CLIP text model."""
        from transformers import CLIPTextModel

        config = _configured("text_encoder").from_dict(dict(self.text_encoder.config))
        # Files and modules have or lack the prefix, depending on the version of transformers.
        return self.text_encoder.load(
            lambda: CLIPTextModel(config),
            lambda name: f"text_model.{name}",
            lambda name: name.removeprefix("text_model."),
        )

    def load_unet(self) -> torch.nn.Module:
        """Return the U-Net."""
        return self.unet.load(lambda: _configured("unet").from_config(dict(self.unet.config)))

    def load_vae(self) -> torch.nn.Module:
        """Return the autoencoder."""
        return self.vae.load(lambda: _configured("vae").from_config(dict(self.vae.config)), _old_attention_name)


def _configured(part: str) -> Any:
    """Return the class whose parameters are the config of a component."""
    if part == "text_encoder":
        from transformers import CLIPTextConfig as Configured
    elif part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as Configured
    else:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Configured
    return Configured


def _old_attention_name(name: str) -> str:
    """Return the name that autoencoders saved before diffusers 0.15 give to an attention weight."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name
