"""FLUX.2-klein, base and distilled: hidden states of Qwen3 as the conditioning, a transformer on cells of 16 pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, LatentInfo, Precision, ScheduleRule, ShiftLine
from ..checkpoints.checkpoint import Checkpoint, Component, Part
from ..checkpoints.tokenizer import QWEN, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph
from ..networks.autoencoder import decoder_graph, geometry, vae_factor
from ..networks.flux2 import FLUX2_TRANSFORMER, FLUX2_VAE, SquaresDecoder, denoiser_graph
from ..networks.qwen import QWEN3_CAUSAL, chat_template, check_encoder, text_encoder_graph
from ..single_files.flux import FLUX2, open_transformer
from .base import Family
from .checks import check_axes, check_channels, check_equal

TOKENS = 512
"""Of a conversation, padding among them: the transformer sees it all, so that other numbers make other pictures."""
SHIFTS = (
    ShiftLine(steps=10, slope=8.73809524e-05, offset=1.89833333),
    ShiftLine(steps=200, slope=0.00016927, offset=0.45666666),
)
"""diffusers' `compute_empirical_mu`."""
MANY_TOKENS = 4300
CELLS = 64
"""Squares of four cells of the VAE, on each side of the pipelines' own size."""


class Flux2(Family):
    """FLUX.2-klein for pictures from text."""

    name = "flux2"
    title = "FLUX.2-klein"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    reference = "Flux2KleinPipeline"
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": QWEN3_CAUSAL,
        "transformer": FLUX2_TRANSFORMER,
        "vae": FLUX2_VAE,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {"tokenizer": replace(QWEN, masked=True, any_length=True)}
    layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """The text encoder's, behind which hidden states are taken."""
    guided: ClassVar[bool] = False
    """Whether its transformer reads a guidance scale."""

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file of the original layout, which holds the transformer."""
        found = open_transformer(FLUX2, file, weights, self.parts["transformer"], base)
        return None if found and not base and found.config["guidance_embeds"] != self.guided else found

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for transformers with other inputs, `CheckpointError` for parts of others."""
        channels, config = 4 * checkpoint.config("vae")["latent_channels"], checkpoint.config("transformer")
        check_channels(
            checkpoint,
            "transformer",
            {(channels, channels)} if config["patch_size"] == 1 else (),
            f"four cells of the VAE have {channels}",
            "use an ordinary one",
        )
        check_axes(checkpoint, 4)
        encoder = checkpoint.config("text_encoder")
        check_encoder(encoder, self.layers, checkpoint.components["text_encoder"].where)
        count, width = len(self.layers), len(self.layers) * encoder["hidden_size"]
        check_equal(checkpoint, "transformer", "joint_attention_dim", width, f"{count} layers of the text encoder")

    def token_lengths(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
        """Return the pipelines' own length."""
        return {"tokenizer": (TOKENS, checkpoint.config("text_encoder")["vocab_size"])}

    def tokenizer_kinds(self, checkpoint: Checkpoint) -> Mapping[str, TokenizerKind]:
        """Return the tokenizer with the template of a conversation whose answer needs no thinking."""
        template = chat_template(checkpoint.tokenizers["tokenizer"].folder, thinking=False)
        return {"tokenizer": replace(self.tokenizers["tokenizer"], template=template)}

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser and decoder. Pictures are references to diffusers, and have no graph."""
        length = lengths["tokenizer"]
        return {
            "text_encoder": self.text_encoder(checkpoint, precision, length),
            "denoiser": lambda: denoiser_graph(checkpoint.load("transformer"), length, precision),
            "decoder": lambda: decoder_graph(SquaresDecoder(checkpoint.load("vae"))),
        }

    def text_encoder(self, checkpoint: Checkpoint, precision: Precision, length: int) -> Callable[[], Graph]:
        """Return what loads the text encoder as a graph."""
        return lambda: text_encoder_graph(checkpoint.load("text_encoder"), self.layers, precision, length)

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the geometry of squares of four cells of the VAE, which are one of the latents."""
        factor = 2 * vae_factor(checkpoint.config("vae"))
        return geometry(factor, checkpoint.config("transformer")["in_channels"], CELLS, CELLS)

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return even sigmas, shifted by the number of tokens and of steps where the scheduler asks for it."""
        side = self.latent(checkpoint).downscale
        return ScheduleRule(sigmas="even", lines=SHIFTS, last_line_above=MANY_TOKENS, pixels_per_token=side)

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return classifier-free guidance, or none for a distilled transformer."""
        return GuidanceInfo(above=None) if checkpoint.options.get("is_distilled") else GuidanceInfo()

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines, or what a distilled transformer is made for."""
        scale, steps = (1.0, 4) if checkpoint.options.get("is_distilled") else (4.0, 50)
        return {"default_guidance_scale": scale, "default_num_inference_steps": steps}


FAMILY = Flux2()
