"""FLUX.1, dev and schnell: a transformer on squares of latents, CLIP's pooled text and T5's, an embedded guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, LatentInfo, Precision, ScheduleRule
from ..checkpoints.checkpoint import Checkpoint, Component, Part
from ..checkpoints.tokenizer import CLIP, T5, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph
from ..networks.autoencoder import AUTOENCODER_KL, geometry, vae_factor
from ..networks.clip import CLIP_TEXT
from ..networks.flux import FLUX_TRANSFORMER, denoiser_graph
from ..networks.t5 import T5_ENCODER
from ..networks.texts import ClipAndT5, texts_graph
from ..shift import shift_line
from ..single_files.flux import FLUX, open_transformer
from .base import Family
from .checks import check_axes, check_channels, check_equal

TOKENS = 512
"""Of T5, padding among them: it is not masked, so that other numbers make other pictures."""
CELLS = 128
"""On each side of the pipelines' own size."""


class Flux(Family):
    """FLUX.1 for pictures from text, whole or distilled to few steps."""

    name = "flux"
    title = "FLUX.1"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    reference = "FluxPipeline"
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": T5_ENCODER,
        "transformer": FLUX_TRANSFORMER,
        "vae": AUTOENCODER_KL,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {
        "tokenizer": CLIP,
        "tokenizer_2": replace(T5, source="prompt_2", any_length=True),
    }
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file of the original layout, which holds the transformer."""
        return open_transformer(FLUX, file, weights, self.parts["transformer"], base)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for transformers with other inputs, `CheckpointError` for parts of others."""
        channels = 4 * checkpoint.config("vae")["latent_channels"]
        check_channels(
            checkpoint,
            "transformer",
            {(channels, channels)} if checkpoint.config("transformer")["patch_size"] == 1 else (),
            f"four cells of the VAE have {channels}",
            "checkpoints for filling, control and editing are not supported, use the ordinary one",
        )
        check_axes(checkpoint, 3)
        for key, encoder, width in (
            ("joint_attention_dim", "text_encoder_2", "d_model"),
            ("pooled_projection_dim", "text_encoder", "hidden_size"),
        ):
            check_equal(checkpoint, "transformer", key, checkpoint.config(encoder)[width], encoder)

    def token_lengths(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
        """Return the most tokens of a prompt and the size of the vocabulary, for CLIP and T5."""
        clip, t5 = checkpoint.config("text_encoder"), checkpoint.config("text_encoder_2")
        return {
            "tokenizer": (clip["max_position_embeddings"], clip["vocab_size"]),
            "tokenizer_2": (TOKENS, t5["vocab_size"]),
        }

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder."""
        length, t5 = lengths["tokenizer_2"], checkpoint.config("text_encoder_2")
        tokens: dict[str, Any] = {**self.tokens(checkpoint, lengths), "token_ids_2": ("L", t5["vocab_size"])}
        return {
            "text_encoder": lambda: texts_graph(
                ClipAndT5(checkpoint.load("text_encoder"), checkpoint.load("text_encoder_2")),
                tokens,
                ("L", t5["d_model"]),
                checkpoint.config("text_encoder")["hidden_size"],
                precision,
                usual={"L": length},
            ),
            "denoiser": lambda: denoiser_graph(checkpoint.load("transformer"), length, precision),
            **self.vae_graphs(checkpoint),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; a token is a square of four cells."""
        vae = checkpoint.config("vae")
        return geometry(vae_factor(vae), vae["latent_channels"], CELLS, CELLS, square=2)

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return even sigmas, shifted by the number of tokens where the scheduler asks for it."""
        side = self.latent(checkpoint).size_multiple
        return ScheduleRule(sigmas="even", lines=(shift_line(checkpoint.scheduler),), pixels_per_token=side)

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return guidance by a second prediction for a negative prompt, which has a scale of its own."""
        return GuidanceInfo(scale="true_cfg_scale", needs_negative=True)

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines for dev, and what schnell, which reads no scale, is made for."""
        steps = (3.5, 28) if self.inputs(checkpoint) else (0.0, 4)
        names = ("default_guidance_scale", "default_num_inference_steps")
        return dict(zip(names, steps, strict=True)) | {"default_strength": 0.6, "default_inpainting_strength": 0.6}


FAMILY = Flux()
