"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which may be missing, and a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...engines.bundle import LatentInfo, Precision, ScheduleRule, TensorInfo
from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Part
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import CLIP, T5, TokenizerKind
from ..graph import Graph, network_dtype, outward
from ..networks.autoencoder import AUTOENCODER_KL, decoder_graph, image_encoder_graph, vae_factor
from ..networks.clip import CLIP_TEXT_PROJECTION, before_last
from ..networks.sd3_transformer import SD3_TRANSFORMER, denoiser_graph
from ..networks.t5 import T5_ENCODER, hidden_states, prepare
from ..reference import reference_pipeline
from ..shift import shift_line
from .base import Family

CLIPS = ("text_encoder", "text_encoder_2")
T5_TOKENS = 256
"""The pipelines' own length, of padding where T5 is missing."""


class TextEncoders(nn.Module):
    """CLIP's last but one layers side by side, with T5's last hidden states behind them; zeros fill up both."""

    def __init__(self, clips: list[Any], t5: Any | None, width: int) -> None:
        super().__init__()
        self.clips, self.t5, self.width = nn.ModuleList(clips), None if t5 is None else prepare(t5), width

    def forward(
        self, token_ids: Tensor, token_ids_2: Tensor, token_ids_3: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the conditioning [R, L, E] and the pooled one [R, P]."""
        found = [before_last(clip, ids) for clip, ids in zip(self.clips, (token_ids, token_ids_2), strict=True)]
        clips, pooled = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
        clips = nn.functional.pad(clips, (0, self.width - clips.shape[-1]))
        if self.t5 is None or token_ids_3 is None:
            return outward(nn.functional.pad(clips, (0, 0, 0, T5_TOKENS))), outward(pooled)
        behind = hidden_states(self.t5, token_ids_3).to(clips.dtype)
        return outward(torch.cat([clips, behind], dim=1)), outward(pooled)


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

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for transformers with other inputs, `CheckpointError` for parts of others."""
        config, where = checkpoint.config("transformer"), checkpoint.components["transformer"].where
        wanted, given = checkpoint.config("vae")["latent_channels"], config["in_channels"]
        if (given, config["out_channels"] or given) != (wanted, wanted):
            raise UnsupportedModelError(
                f"{where}: the transformer takes {given} and gives {shown(config['out_channels'] or given)} channels "
                f"where the VAE has {wanted}: checkpoints for inpainting and editing are not supported"
            )
        if ("text_encoder_3" in checkpoint.components) != ("tokenizer_3" in checkpoint.tokenizers):
            raise CheckpointError(f"{checkpoint.name}: of text_encoder_3 and tokenizer_3 one is missing: give both")
        t5 = checkpoint.config("text_encoder_3")["d_model"] if "text_encoder_3" in checkpoint.components else None
        clips = sum(checkpoint.config(name)["hidden_size"] for name in CLIPS)
        if config["joint_attention_dim"] != (t5 or max(clips, config["joint_attention_dim"])) or clips > (t5 or clips):
            raise CheckpointError(
                f"{where}: joint_attention_dim is {config['joint_attention_dim']} where the text encoders give "
                f"{clips} and {t5}: the parts belong to different checkpoints"
            )
        if config["pooled_projection_dim"] != self._pooled(checkpoint):
            raise CheckpointError(
                f"{where}: pooled_projection_dim is {config['pooled_projection_dim']} where the text encoders give "
                f"{self._pooled(checkpoint)}: the parts belong to different checkpoints"
            )

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
        length = self._length(lengths)
        return {
            "text_encoder": lambda: self._text_encoder(checkpoint, precision, lengths),
            "denoiser": lambda: denoiser_graph(checkpoint.load("transformer"), length, precision),
            "decoder": lambda: decoder_graph(checkpoint.load("vae")),
            "image_encoder": lambda: image_encoder_graph(checkpoint.load("vae")),
        }

    def _text_encoder(self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]) -> Graph:
        """Token ids [R, L] of each tokenizer to the conditioning [R, L, E] and the pooled one [R, P]."""
        tokens = {name.replace("tokenizer", "token_ids"): name for name in checkpoint.tokenizers}
        vocabularies = self.token_lengths(checkpoint)
        width, dtype = checkpoint.config("transformer")["joint_attention_dim"], network_dtype(precision)
        t5 = checkpoint.load("text_encoder_3") if "text_encoder_3" in checkpoint.components else None
        return Graph(
            "text_encoder",
            "prompt",
            TextEncoders([checkpoint.load(name) for name in CLIPS], t5, width),
            tuple(TensorInfo(name=ids, dtype="int64", shape=("R", lengths[name])) for ids, name in tokens.items()),
            (
                TensorInfo(name="context", dtype=dtype, shape=("R", self._length(lengths), width)),
                TensorInfo(name="pooled", dtype=dtype, shape=("R", self._pooled(checkpoint))),
            ),
            limits={ids: vocabularies[name][1] for ids, name in tokens.items()},
        )

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry in the transformer's squares."""
        config, factor = checkpoint.config("transformer"), vae_factor(checkpoint.config("vae"))
        return LatentInfo(
            channels=config["in_channels"],
            downscale=factor,
            size_multiple=config["patch_size"] * factor,
            default_height=config["sample_size"] * factor,
            default_width=config["sample_size"] * factor,
        )

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule:
        """Return the scheduler's own sigmas, shifted by the number of tokens where it asks for it."""
        side = self.latent(checkpoint).size_multiple
        return ScheduleRule(lines=(shift_line(checkpoint.scheduler),), pixels_per_token=side)

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
