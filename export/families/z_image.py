"""Z-Image and Z-Image-Turbo: Qwen3 as the text encoder, one stream of a picture's and a caption's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ...engines.bundle import Branch, GuidanceInfo, LatentInfo, Precision, ScheduleRule
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Component, Part
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import QWEN, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph
from ..networks.autoencoder import AUTOENCODER_KL, geometry, vae_factor
from ..networks.qwen import QWEN3, chat_template, check_encoder, text_encoder_graph
from ..networks.z_image_transformer import Z_IMAGE_TRANSFORMER, denoiser_graph
from ..shift import shift_line
from ..single_files.z_image import Z_IMAGE
from .base import Family
from .checks import check_equal

LENGTHS = (64, 128, 256)
"""Tokens that captions are filled up to, multiples of 32; more are cut off at 512, as the pipelines do it."""
MOST_TOKENS = 512
CELLS = 128
"""On each side of the pipelines' own size."""
SHIFT_OF_TURBO = 3.0
"""The scheduler's shift that Z-Image-Turbo was distilled with; Z-Image has 6."""


class ZImage(Family):
    """Z-Image: the base and Turbo."""

    name = "z-image"
    title = "Z-Image"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": QWEN3,
        "transformer": Z_IMAGE_TRANSFORMER,
        "vae": AUTOENCODER_KL,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {"tokenizer": replace(QWEN, lengths=LENGTHS, masked=True)}
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file of the original layout, of which the transformer is read."""
        return Z_IMAGE.open(file, weights, self.parts["transformer"], base)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for other forms of transformer, `CheckpointError` for parts that do not fit."""
        config, where = checkpoint.config("transformer"), checkpoint.components["transformer"].where
        patches = (list(config["all_patch_size"]), list(config["all_f_patch_size"]))
        if patches != ([2], [1]) or config.get("siglip_feat_dim") is not None:
            raise UnsupportedModelError(
                f"{where}: patches are {shown(patches)} and siglip_feat_dim {shown(config.get('siglip_feat_dim'))}; "
                "Z-Image has patches of [2] and [1], and no pictures among its captions"
            )
        encoder = checkpoint.config("text_encoder")
        check_encoder(encoder, (self._layers(checkpoint),), checkpoint.components["text_encoder"].where)
        check_equal(checkpoint, "transformer", "cap_feat_dim", encoder["hidden_size"], "the text encoder")
        check_equal(checkpoint, "transformer", "in_channels", checkpoint.config("vae")["latent_channels"], "the VAE")

    def token_lengths(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
        """Return the pipelines' own length."""
        return {"tokenizer": (MOST_TOKENS, checkpoint.config("text_encoder")["vocab_size"])}

    def tokenizer_kinds(self, checkpoint: Checkpoint) -> Mapping[str, TokenizerKind]:
        """Return the tokenizer with the template of a conversation that begins with the prompt."""
        template = chat_template(checkpoint.tokenizers["tokenizer"].folder, thinking=True)
        return {"tokenizer": replace(self.tokenizers["tokenizer"], template=template)}

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder; raises `UnsupportedModelError` for fp16."""
        if precision == "fp16":  # the feed-forward layers' products reach further than its range
            raise UnsupportedModelError(
                f"{checkpoint.name}: {self.title} overflows in fp16, and its pictures are black: export in bf16 or fp32"
            )
        layers = (self._layers(checkpoint),)
        return {
            "text_encoder": lambda: text_encoder_graph(checkpoint.load("text_encoder"), layers, precision),
            "denoiser": lambda: denoiser_graph(checkpoint.load("transformer"), precision),
            **self.vae_graphs(checkpoint),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry in tokens of two cells on each side; 128 cells, 1024 pixels, are the usual size."""
        channels = checkpoint.config("transformer")["in_channels"]
        return geometry(vae_factor(checkpoint.config("vae")), channels, CELLS, CELLS, square=2)

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return even sigmas, and a shift for schedulers that take one."""
        pixels = self.latent(checkpoint).size_multiple
        return ScheduleRule(sigmas="even", lines=(shift_line(checkpoint.scheduler),), pixels_per_token=pixels)

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return guidance that adds to the prompt's prediction, for a scale above 0."""
        branches = (Branch(text="negative", scale=-1), Branch(text="prompt", constant=1, scale=1))
        return GuidanceInfo(above=0, branches=branches)

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines; those of its example for Turbo, which is not guided."""
        if checkpoint.scheduler.get("shift") == SHIFT_OF_TURBO:
            steps, scale = 8, 0.0
        else:
            steps, scale = 50, 5.0
        return {"default_num_inference_steps": steps, "default_guidance_scale": scale, "default_strength": 0.6}

    def _layers(self, checkpoint: Checkpoint) -> int:
        """Return how many of the text encoder's layers a caption goes through: all but the last."""
        count: int = checkpoint.config("text_encoder")["num_hidden_layers"] - 1
        return count


FAMILY = ZImage()
