"""Stable Diffusion XL, its few-step descendants and its refiner: two CLIP text encoders, a U-Net that reads sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...engines.bundle import GuidanceInfo, LatentInfo, NumbersInput, Precision, TensorInfo
from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Origin, Part
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import CLIP, TokenizerKind
from ..checkpoints.weights import Weights
from ..few_steps import few_step_defaults
from ..graph import Graph, network_dtype, outward
from ..networks.autoencoder import AUTOENCODER_KL, decoder_graph, image_encoder_graph, vae_factor
from ..networks.clip import CLIP_TEXT, CLIP_TEXT_PROJECTION, before_last
from ..networks.unet import (
    EMBEDDED_GUIDANCE,
    MASKED_PICTURE,
    UNET,
    channels_of,
    denoiser_graph,
    embedded_guidance,
    inpaints,
)
from ..reference import reference_pipeline
from ..single_files.stable_diffusion_xl import SCALE, open_single_file
from .base import Family, FindTokenizer

SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
ENCODERS = ("text_encoder", "text_encoder_2")


class TextEncoders(nn.Module):
    """CLIP's last but one layers side by side, and the projected embedding of the last encoder."""

    def __init__(self, encoders: list[Any]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(
        self, token_ids: Tensor | None = None, token_ids_2: Tensor | None = None, text_given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]; zeros where `text_given` [R, 1] is."""
        ids = [each for each in (token_ids, token_ids_2) if each is not None]
        found = [before_last(encoder, each) for encoder, each in zip(self.encoders, ids, strict=True)]
        context, pooled = torch.cat([hidden for hidden, _ in found], dim=-1), found[-1][1]
        if text_given is not None:
            context, pooled = context * text_given[:, :, None].to(context.dtype), pooled * text_given.to(pooled.dtype)
        return outward(context), outward(pooled)


class StableDiffusionXL(Family):
    """Stable Diffusion XL: base, refiner, Turbo and others of its form."""

    name = "stable-diffusion-xl"
    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": CLIP_TEXT_PROJECTION,
        "unet": UNET,
        "vae": AUTOENCODER_KL,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {
        "tokenizer": CLIP,
        "tokenizer_2": replace(CLIP, source="prompt_2"),
    }
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": SCALE}
    optional = ("text_encoder", "tokenizer")  # the refiner has the second alone

    def open_file(
        self,
        file: Path,
        weights: Weights,
        tokenizer: FindTokenizer,
        prediction_type: str | None,
        replaced: Mapping[str, Origin],
    ) -> Checkpoint | None:
        """Open a single file of the original layout."""
        return open_single_file(file, weights, self.name, self.parts, tokenizer, prediction_type, replaced)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for U-Nets with other inputs, `CheckpointError` for parts that do not fit."""
        unet, where = checkpoint.config("unet"), checkpoint.components["unet"].where
        if unet.get("addition_embed_type") != "text_time":
            raise UnsupportedModelError(
                f"{where}: addition_embed_type is {shown(unet.get('addition_embed_type'))}; Stable Diffusion XL has "
                "'text_time'"
            )
        latent, channels = checkpoint.config("vae")["latent_channels"], (unet["in_channels"], unet["out_channels"])
        if channels not in channels_of(checkpoint.pipeline, latent):
            raise UnsupportedModelError(
                f"{where}: the U-Net takes {channels[0]} and gives {channels[1]} channels where the VAE has "
                f"{latent}: editing checkpoints are not supported, use the ordinary one"
            )
        width = sum(checkpoint.config(name)["hidden_size"] for name in ENCODERS if name in checkpoint.components)
        if width != unet["cross_attention_dim"]:
            raise CheckpointError(
                f"{where}: cross_attention_dim is {shown(unet['cross_attention_dim'])} where the text encoders give "
                f"{width}: the parts belong to different checkpoints"
            )
        rest = unet["projection_class_embeddings_input_dim"] - self._pooled(checkpoint)
        if rest != len(self._sizes(checkpoint)) * unet["addition_time_embed_dim"]:
            raise CheckpointError(
                f"{where}: projection_class_embeddings_input_dim is "
                f"{shown(unet['projection_class_embeddings_input_dim'])}, which the prompt's embedding and "
                f"{len(self._sizes(checkpoint))} size ids do not fill: the parts belong to different checkpoints"
            )

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder."""
        length, pooled = lengths["tokenizer_2"], self._pooled(checkpoint)
        masked = inpaints(checkpoint.config("unet"))
        return {
            "text_encoder": lambda: self._text_encoder(checkpoint, precision, lengths),
            "denoiser": lambda: denoiser_graph(checkpoint.load("unet"), length, precision, pooled),
            "decoder": lambda: decoder_graph(checkpoint.load("vae")),
            "image_encoder": lambda: image_encoder_graph(checkpoint.load("vae"), masked=masked),
        }

    def _text_encoder(self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]) -> Graph:
        """Token ids [R, L] of each tokenizer to the conditioning [R, L, E] and the pooled one [R, P]."""
        names, dtype = [name for name in ENCODERS if name in checkpoint.components], network_dtype(precision)
        tokens = {name.replace("text_encoder", "token_ids"): name for name in names}
        length = lengths["tokenizer_2"]
        inputs = [TensorInfo(name=each, dtype="int64", shape=("R", length)) for each in tokens]
        limits = {each: checkpoint.config(name)["vocab_size"] for each, name in tokens.items()}
        if self._zeros(checkpoint):
            inputs.append(TensorInfo(name="text_given", dtype="float32", shape=("R", 1)))
        width = sum(checkpoint.config(name)["hidden_size"] for name in names)
        return Graph(
            "text_encoder",
            "prompt",
            TextEncoders([checkpoint.load(name) for name in names]),
            tuple(inputs),
            (
                TensorInfo(name="context", dtype=dtype, shape=("R", length, width)),
                TensorInfo(name="pooled", dtype=dtype, shape=("R", self._pooled(checkpoint))),
            ),
            limits=limits,
        )

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; the U-Net takes every latent size."""
        unet, factor = checkpoint.config("unet"), vae_factor(checkpoint.config("vae"))
        size = unet["sample_size"] or 128
        height, width = (size, size) if isinstance(size, int) else size
        return LatentInfo(
            channels=unet["out_channels"],
            downscale=factor,
            size_multiple=factor,
            default_height=height * factor,
            default_width=width * factor,
        )

    def inputs(self, checkpoint: Checkpoint) -> tuple[NumbersInput, ...]:
        """Return the size ids, and whether there is a negative prompt, which is zeros where there is none."""
        sizes = self._sizes(checkpoint)
        negative: Any = tuple(f"negative_{name}" for name in sizes)
        found = [NumbersInput(name="time_ids", values=sizes, negative=negative)]
        if self._zeros(checkpoint):
            found.append(NumbersInput(name="text_given", values=(1.0,), negative=("negative_given",)))
        if embedded_guidance(checkpoint.config("unet")):
            found += EMBEDDED_GUIDANCE
        return tuple(found)

    def masked_input(self, checkpoint: Checkpoint) -> str | None:
        """Return the U-Net's input for a picture and its mask, where it is made for inpainting."""
        return MASKED_PICTURE if inpaints(checkpoint.config("unet")) else None

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return classifier-free guidance, or none where the U-Net reads the scale."""
        return GuidanceInfo(above=None) if embedded_guidance(checkpoint.config("unet")) else GuidanceInfo()

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines, or what a checkpoint of few steps is made for."""
        usual = {"default_guidance_scale": 5.0, "default_strength": 0.3, "default_inpainting_strength": 0.9999}
        return usual | few_step_defaults(checkpoint)

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return diffusers' pipeline of the checkpoint."""
        return reference_pipeline(checkpoint, checkpoint.pipeline, {})

    def _sizes(self, checkpoint: Checkpoint) -> tuple[Any, ...]:
        scored = checkpoint.options.get("requires_aesthetics_score", False)
        return (*SIZES[:4], "aesthetic_score") if scored else SIZES

    def _zeros(self, checkpoint: Checkpoint) -> bool:
        """Tell whether zeros stand for a negative prompt that is not given."""
        return bool(checkpoint.options.get("force_zeros_for_empty_prompt", True))

    def _pooled(self, checkpoint: Checkpoint) -> int:
        width: int = checkpoint.config("text_encoder_2")["projection_dim"]
        return width


FAMILY = StableDiffusionXL()
