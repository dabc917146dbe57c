"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross-attention, a KL autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, LatentInfo, Precision
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Part, SingleFile
from ..checkpoints.configs import shown
from ..checkpoints.mended import mended_sample_size, mended_scheduler
from ..few_steps import few_step_defaults
from ..graph import Graph
from ..networks.autoencoder import AUTOENCODER_KL, geometry, vae_factor
from ..networks.clip import CLIP_TEXT, text_encoder_graph
from ..networks.unet import (
    MASKED_PICTURE,
    UNET,
    channels_of,
    denoiser_graph,
    embedded_guidance,
    inpaints,
)
from ..reference import reference_pipeline
from ..single_files.stable_diffusion import open_single_file
from .base import Family
from .checks import check_channels, check_equal

ORDINARY_UNET = {  # config keys that change what a U-Net takes in, with the values that leave it alone
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "attention_type": (None, "default"),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (None, False),
}


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, text to image."""

    name = "stable-diffusion"
    title = "Stable Diffusion 1.x and 2.x"
    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {"text_encoder": CLIP_TEXT, "unet": UNET, "vae": AUTOENCODER_KL}

    def open_file(self, file: SingleFile) -> Checkpoint | None:
        """Open a single file of the original layout."""
        return open_single_file(file, self.name, self.parts)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for U-Nets with other inputs than latents, timestep and text."""
        unet, vae = checkpoint.config("unet"), checkpoint.config("vae")
        where = checkpoint.components["unet"].where
        for key, ordinary in ORDINARY_UNET.items():
            if unet.get(key) not in ordinary:
                raise UnsupportedModelError(
                    f"{where}: U-Net option {key}={shown(unet[key])} is not supported; "
                    "Stable Diffusion 1.x and 2.x text-to-image checkpoints are"
                )
        if vae.get("shift_factor"):
            raise UnsupportedModelError(
                f"{checkpoint.components['vae'].where}: shift_factor is {shown(vae['shift_factor'])}, which Stable "
                "Diffusion 1.x and 2.x do not know: give a VAE of these versions"
            )
        text = checkpoint.components["text_encoder"]
        if text.config.get("use_attention_mask"):
            raise UnsupportedModelError(
                f"{text.where}: use_attention_mask is {shown(text.config['use_attention_mask'])}; text encoders that "
                "mask the padding of a prompt are not supported"
            )
        advice = "depth, editing and upscaling checkpoints are not supported, use the ordinary one"
        latent = vae["latent_channels"]
        check_channels(checkpoint, "unet", channels_of(checkpoint.pipeline, latent), f"the VAE has {latent}", advice)
        check_equal(checkpoint, "unet", "cross_attention_dim", text.config["hidden_size"], "the text encoder")

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder."""
        length, masked = lengths["tokenizer"], inpaints(checkpoint.config("unet"))
        return {
            "text_encoder": lambda: text_encoder_graph(checkpoint.load("text_encoder"), length, precision),
            "denoiser": lambda: denoiser_graph(checkpoint.load("unet"), length, precision),
            **self.vae_graphs(checkpoint, masked=masked),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; the U-Net takes every latent size."""
        unet = checkpoint.config("unet")
        size = mended_sample_size(unet) or 64
        height, width = (size, size) if isinstance(size, int) else size
        return geometry(vae_factor(checkpoint.config("vae")), unet["out_channels"], height, width)

    def scheduler(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the scheduler config as the checkpoint's own pipeline class mends it."""
        return mended_scheduler(checkpoint.scheduler, checkpoint.pipeline)

    def masked_input(self, checkpoint: Checkpoint) -> str | None:
        """Return the U-Net's input for a picture and its mask, where it is made for inpainting."""
        return MASKED_PICTURE if inpaints(checkpoint.config("unet")) else None

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return classifier-free guidance, or none where the U-Net reads the scale."""
        return GuidanceInfo(above=None) if embedded_guidance(checkpoint.config("unet")) else GuidanceInfo()

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what a checkpoint of few steps is made for."""
        return few_step_defaults(checkpoint)

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return a `StableDiffusionPipeline` that diffusers has opened, its scheduler as the checkpoint's own class.

        A U-Net for inpainting has the checkpoint's own pipeline.
        """
        masked = inpaints(checkpoint.config("unet"))
        return reference_pipeline(checkpoint, checkpoint.pipeline if masked else "StableDiffusionPipeline")


FAMILY = StableDiffusion()
