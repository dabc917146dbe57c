"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which may be missing, and a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ...engines.bundle import LatentInfo, Precision, ScheduleRule
from ...engines.errors import CheckpointError, RequestError
from ..checkpoints.checkpoint import Checkpoint, Component, Part
from ..checkpoints.tokenizer import CLIP, T5, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph
from ..networks.autoencoder import AUTOENCODER_KL, geometry, vae_factor
from ..networks.clip import CLIP_TEXT_PROJECTION
from ..networks.sd3_transformer import SD3_TRANSFORMER, denoiser_graph
from ..networks.t5 import T5_ENCODER
from ..networks.texts import T5_TOKENS, ClipsAndT5, texts_graph
from ..reference import reference_pipeline
from ..shift import shift_line
from ..single_files.stable_diffusion_3 import SD3
from .base import Family
from .checks import check_channels, check_equal

CLIPS = ("text_encoder", "text_encoder_2")
OF_MEDIUM = (7, 8, 9)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, medium and large."""

    name = "stable-diffusion-3"
    title = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT_PROJECTION,
        "text_encoder_2": CLIP_TEXT_PROJECTION,
        "text_encoder_3": T5_ENCODER,
        "transformer": SD3_TRANSFORMER,
        "vae": AUTOENCODER_KL,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {
        "tokenizer": CLIP,
        "tokenizer_2": replace(CLIP, source="prompt_2"),
        "tokenizer_3": replace(T5, source="prompt_3"),
    }
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    optional = ("text_encoder_3", "tokenizer_3")

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file of the original layout, of which the transformer is read."""
        return SD3.open(file, weights, self.parts["transformer"], base)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for transformers with other inputs, `CheckpointError` for parts of others."""
        config, channels = checkpoint.config("transformer"), checkpoint.config("vae")["latent_channels"]
        advice = "checkpoints for inpainting and editing are not supported"
        check_channels(checkpoint, "transformer", {(channels, channels)}, f"the VAE has {channels}", advice)
        if ("text_encoder_3" in checkpoint.components) != ("tokenizer_3" in checkpoint.tokenizers):
            raise CheckpointError(f"{checkpoint.name}: of text_encoder_3 and tokenizer_3 one is missing: give both")
        clips, width = sum(checkpoint.config(name)["hidden_size"] for name in CLIPS), config["joint_attention_dim"]
        if "text_encoder_3" in checkpoint.components:
            t5 = checkpoint.config("text_encoder_3")["d_model"]
            check_equal(checkpoint, "transformer", "joint_attention_dim", t5, "text_encoder_3")
        check_equal(checkpoint, "transformer", "joint_attention_dim", max(clips, width), "the CLIP text encoders'")
        check_equal(checkpoint, "transformer", "pooled_projection_dim", self._pooled(checkpoint), "CLIP")

    def token_lengths(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
        """Return the most tokens of a prompt and the size of the vocabulary: CLIP's positions, and 256 for T5."""
        encoders = {name: name.replace("tokenizer", "text_encoder") for name in checkpoint.tokenizers}
        configs = {name: checkpoint.config(encoder) for name, encoder in encoders.items()}
        return {
            name: (config.get("max_position_embeddings", T5_TOKENS), config["vocab_size"])
            for name, config in configs.items()
        }

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser, decoder and image encoder."""
        width, length = checkpoint.config("transformer")["joint_attention_dim"], self._length(lengths)

        def texts() -> Graph:
            t5 = checkpoint.load("text_encoder_3") if "text_encoder_3" in checkpoint.components else None
            module = ClipsAndT5([checkpoint.load(name) for name in CLIPS], t5, width)
            tokens, pooled = self.tokens(checkpoint, lengths), self._pooled(checkpoint)
            return texts_graph(module, tokens, (length, width), pooled, precision)

        return {
            "text_encoder": texts,
            "denoiser": lambda: denoiser_graph(
                checkpoint.load("transformer"), length, precision, checkpoint.skip_layers or ()
            ),
            **self.vae_graphs(checkpoint),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry in the transformer's squares."""
        config = checkpoint.config("transformer")
        size = config["sample_size"]
        return geometry(vae_factor(checkpoint.config("vae")), config["in_channels"], size, size, config["patch_size"])

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return the scheduler's own sigmas, shifted by the number of tokens where it asks for it.

        Where no scheduler class has a largest shift of its own, diffusers' pipelines of this family take another.
        """
        side, scheduler = self.latent(checkpoint).size_multiple, checkpoint.scheduler
        own = str(scheduler.get("_class_name")).startswith("FlowMatch")
        line = shift_line(scheduler) if own else shift_line(scheduler, max_shift=1.16)
        return ScheduleRule(lines=(line,), pixels_per_token=side)

    def skip_layers(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the layers as asked for, or what Stability AI recommends for 3.5 medium, which has dual attention."""
        config = checkpoint.config("transformer")
        count, asked = config["num_layers"], checkpoint.skip_layers
        if asked is None:
            return OF_MEDIUM if config["dual_attention_layers"] and count > max(OF_MEDIUM) else ()
        if wrong := [layer for layer in asked if layer not in range(count)]:
            raise RequestError(f"skip_layers has {wrong[0]}: this transformer has layers 0 to {count - 1}, give those")
        return tuple(sorted({*asked}))

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipelines."""
        strength = {"default_strength": 0.6, "default_inpainting_strength": 0.6}
        return {"default_num_inference_steps": 28, "default_guidance_scale": 7.0} | strength

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return diffusers' pipeline of the checkpoint, which is told what it is without."""
        without = {*self.optional} - {*checkpoint.components, *checkpoint.tokenizers}
        return reference_pipeline(checkpoint, checkpoint.pipeline, dict.fromkeys(without))

    def _pooled(self, checkpoint: Checkpoint) -> int:
        return sum(checkpoint.config(name)["projection_dim"] for name in CLIPS)

    def _length(self, lengths: Mapping[str, int]) -> int:
        """Return the tokens of a text: CLIP's and behind them T5's."""
        return lengths["tokenizer"] + lengths.get("tokenizer_3", T5_TOKENS)


FAMILY = StableDiffusion3()
