"""FLUX.1, dev and schnell: a transformer on squares of latents, CLIP's pooled text and T5's, an embedded guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...engines.bundle import GuidanceInfo, LatentInfo, NumbersInput, Precision, ScheduleRule, TensorInfo
from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Component, Part
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import CLIP, T5, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph, network_dtype, outward
from ..networks.autoencoder import AUTOENCODER_KL, decoder_graph, image_encoder_graph, vae_factor
from ..networks.clip import CLIP_TEXT
from ..networks.flux import FLUX_TRANSFORMER, denoiser_graph
from ..networks.t5 import T5_ENCODER, hidden_states, prepare
from ..networks.unet import EMBEDDED_GUIDANCE
from ..reference import reference_pipeline
from ..shift import shift_line
from ..single_files.flux import open_transformer
from .base import Family

TOKENS = 512
"""Of T5, padding among them: it is not masked, so that other numbers make other pictures."""


class TextEncoders(nn.Module):
    """T5's last hidden states, and CLIP's embedding of the whole text."""

    def __init__(self, clip: Any, t5: Any) -> None:
        super().__init__()
        self.clip, self.t5 = clip, prepare(t5)

    def forward(self, token_ids: Tensor, token_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]."""
        return outward(hidden_states(self.t5, token_ids_2)), outward(self.clip(token_ids).pooler_output)


class Flux(Family):
    """FLUX.1 for pictures from text, whole or distilled to few steps."""

    name = "flux"
    title = "FLUX.1"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": T5_ENCODER,
        "transformer": FLUX_TRANSFORMER,
        "vae": AUTOENCODER_KL,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {
        "tokenizer": CLIP,
        "tokenizer_2": replace(T5, source="prompt_2"),
    }
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file of the original layout, which holds the transformer."""
        return open_transformer(file, weights, self.parts["transformer"], base)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for transformers with other inputs, `CheckpointError` for parts of others."""
        config, where = checkpoint.config("transformer"), checkpoint.components["transformer"].where
        wanted, given = 4 * checkpoint.config("vae")["latent_channels"], config["in_channels"]
        if config["patch_size"] != 1 or (given, config["out_channels"] or given) != (wanted, wanted):
            raise UnsupportedModelError(
                f"{where}: the transformer takes {given} and gives {shown(config['out_channels'] or given)} channels "
                f"where four cells of the VAE have {wanted}: checkpoints for filling, control and editing are not "
                "supported, use the ordinary one"
            )
        if sum(config["axes_dims_rope"]) != config["attention_head_dim"] or len(config["axes_dims_rope"]) != 3:
            raise CheckpointError(
                f"{where}: axes_dims_rope {shown(config['axes_dims_rope'])} are not three numbers of which "
                f"attention_head_dim {config['attention_head_dim']} is the sum"
            )
        for key, encoder, width in (
            ("joint_attention_dim", "text_encoder_2", "d_model"),
            ("pooled_projection_dim", "text_encoder", "hidden_size"),
        ):
            if config[key] != checkpoint.config(encoder)[width]:
                raise CheckpointError(
                    f"{where}: {key} is {config[key]} where {encoder} gives {checkpoint.config(encoder)[width]}: "
                    "the parts belong to different checkpoints"
                )

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
        return {
            "text_encoder": lambda: self._text_encoder(checkpoint, precision, lengths),
            "denoiser": lambda: denoiser_graph(checkpoint.load("transformer"), lengths["tokenizer_2"], precision),
            "decoder": lambda: decoder_graph(checkpoint.load("vae")),
            "image_encoder": lambda: image_encoder_graph(checkpoint.load("vae")),
        }

    def _text_encoder(self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]) -> Graph:
        """Token ids [R, L] of each tokenizer to the conditioning [R, L, E] and the pooled one [R, P]."""
        clip, t5 = checkpoint.config("text_encoder"), checkpoint.config("text_encoder_2")
        dtype, length = network_dtype(precision), lengths["tokenizer_2"]
        return Graph(
            "text_encoder",
            "prompt",
            TextEncoders(checkpoint.load("text_encoder"), checkpoint.load("text_encoder_2")),
            (
                TensorInfo(name="token_ids", dtype="int64", shape=("R", lengths["tokenizer"])),
                TensorInfo(name="token_ids_2", dtype="int64", shape=("R", length)),
            ),
            (
                TensorInfo(name="context", dtype=dtype, shape=("R", length, t5["d_model"])),
                TensorInfo(name="pooled", dtype=dtype, shape=("R", clip["hidden_size"])),
            ),
            limits={"token_ids": clip["vocab_size"], "token_ids_2": t5["vocab_size"]},
        )

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; a token is a square of four cells."""
        factor = vae_factor(checkpoint.config("vae"))
        return LatentInfo(
            channels=checkpoint.config("vae")["latent_channels"],
            downscale=factor,
            size_multiple=2 * factor,
            default_height=128 * factor,
            default_width=128 * factor,
        )

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return even sigmas, shifted by the number of tokens where the scheduler asks for it."""
        side = 2 * vae_factor(checkpoint.config("vae"))
        return ScheduleRule(sigmas="even", lines=(shift_line(checkpoint.scheduler),), pixels_per_token=side)

    def inputs(self, checkpoint: Checkpoint) -> tuple[NumbersInput, ...]:
        """Return the guidance scale, where the transformer reads it."""
        return EMBEDDED_GUIDANCE if checkpoint.config("transformer").get("guidance_embeds") else ()

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return guidance by a second prediction for a negative prompt, which has a scale of its own."""
        return GuidanceInfo(scale="true_cfg_scale", needs_negative=True)

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines for dev, and what schnell, which reads no scale, is made for."""
        steps = (3.5, 28) if self.inputs(checkpoint) else (0.0, 4)
        names = ("default_guidance_scale", "default_num_inference_steps")
        return dict(zip(names, steps, strict=True)) | {"default_strength": 0.6, "default_inpainting_strength": 0.6}

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return diffusers' pipeline of the checkpoint."""
        return reference_pipeline(checkpoint, "FluxPipeline", {})


FAMILY = Flux()
