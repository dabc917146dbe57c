"""Stable Diffusion XL, its few-step descendants and its refiner: two CLIP text encoders, a U-Net that reads sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, LatentInfo, NumbersInput, Precision, TensorInfo
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Part, SingleFile
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import CLIP, TokenizerKind
from ..few_steps import few_step_defaults
from ..graph import Graph
from ..networks.autoencoder import AUTOENCODER_KL, geometry, vae_factor
from ..networks.clip import CLIP_TEXT, CLIP_TEXT_PROJECTION
from ..networks.texts import Clips, texts_graph
from ..networks.unet import (
    MASKED_PICTURE,
    UNET,
    channels_of,
    denoiser_graph,
    embedded_guidance,
    inpaints,
)
from ..single_files.stable_diffusion_xl import SCALE, SIZE, open_single_file
from .base import Family
from .checks import check_channels, check_equal

SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
ENCODERS = ("text_encoder", "text_encoder_2")


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

    def open_file(self, file: SingleFile) -> Checkpoint | None:
        """Open a single file of the original layout."""
        return open_single_file(file, self.name, self.parts)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for U-Nets with other inputs, `CheckpointError` for parts that do not fit."""
        unet, where = checkpoint.config("unet"), checkpoint.components["unet"].where
        if unet.get("addition_embed_type") != "text_time":
            raise UnsupportedModelError(
                f"{where}: addition_embed_type is {shown(unet.get('addition_embed_type'))}; Stable Diffusion XL has "
                "'text_time'"
            )
        advice, latent = "editing checkpoints are not supported, use the ordinary one", self._channels(checkpoint)
        check_channels(checkpoint, "unet", channels_of(checkpoint.pipeline, latent), f"the VAE has {latent}", advice)
        check_equal(checkpoint, "unet", "cross_attention_dim", self._width(checkpoint), "the text encoders'")
        width = self._pooled(checkpoint) + len(self._sizes(checkpoint)) * unet["addition_time_embed_dim"]
        key = "projection_class_embeddings_input_dim"
        check_equal(checkpoint, "unet", key, width, "the prompt's embedding with the size ids")

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder."""
        length, pooled = lengths["tokenizer_2"], self._pooled(checkpoint)
        given = [TensorInfo(name="text_given", dtype="float32", shape=("R", 1))] if self._zeros(checkpoint) else []
        names = [name for name in ENCODERS if name in checkpoint.components]
        return {
            "text_encoder": lambda: texts_graph(
                Clips([checkpoint.load(name) for name in names]),
                self.tokens(checkpoint, lengths),
                (length, self._width(checkpoint)),
                pooled,
                precision,
                given,
            ),
            "denoiser": lambda: denoiser_graph(checkpoint.load("unet"), length, precision, pooled),
            **self.vae_graphs(checkpoint, masked=inpaints(checkpoint.config("unet"))),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; the U-Net takes every latent size."""
        size = checkpoint.config("unet")["sample_size"] or SIZE
        height, width = (size, size) if isinstance(size, int) else size
        return geometry(vae_factor(checkpoint.config("vae")), self._channels(checkpoint), height, width)

    def inputs(self, checkpoint: Checkpoint) -> tuple[NumbersInput, ...]:
        """Return the size ids, and whether there is a negative prompt, which is zeros where there is none."""
        sizes = self._sizes(checkpoint)
        negative: Any = tuple(f"negative_{name}" for name in sizes)
        found = [NumbersInput(name="time_ids", values=sizes, negative=negative)]
        if self._zeros(checkpoint):
            found.append(NumbersInput(name="text_given", values=(1.0,), negative=("negative_given",)))
        return (*found, *super().inputs(checkpoint))

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

    def _sizes(self, checkpoint: Checkpoint) -> tuple[Any, ...]:
        scored = checkpoint.options.get("requires_aesthetics_score", False)
        return (*SIZES[:4], "aesthetic_score") if scored else SIZES

    def _zeros(self, checkpoint: Checkpoint) -> bool:
        """Tell whether zeros stand for a negative prompt that is not given."""
        return bool(checkpoint.options.get("force_zeros_for_empty_prompt", True))

    def _channels(self, checkpoint: Checkpoint) -> int:
        channels: int = checkpoint.config("vae")["latent_channels"]
        return channels

    def _width(self, checkpoint: Checkpoint) -> int:
        return sum(checkpoint.config(name)["hidden_size"] for name in ENCODERS if name in checkpoint.components)

    def _pooled(self, checkpoint: Checkpoint) -> int:
        width: int = checkpoint.config("text_encoder_2")["projection_dim"]
        return width


FAMILY = StableDiffusionXL()
