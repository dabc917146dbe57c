"""What a model family is to the exporter: it recognizes its checkpoints and turns them into graphs.

A family is one module in this folder with an object called `FAMILY`. Nothing else names it: the exporter, the runtime
and the engines work with what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, LatentInfo, NumbersInput, Precision, ScheduleRule
from ...engines.errors import RequestError
from ..checkpoints.checkpoint import Checkpoint, Component, Part, SingleFile
from ..checkpoints.tokenizer import CLIP, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph
from ..networks.autoencoder import decoder_graph, image_encoder_graph
from ..networks.unet import EMBEDDED_GUIDANCE
from ..reference import reference_pipeline


class Family(ABC):
    """A family of checkpoints with one way to export them."""

    name: ClassVar[str]
    """What manifests call the family."""
    title: ClassVar[str]
    """What messages call it."""
    pipelines: ClassVar[tuple[str, ...]]
    """Class names in `model_index.json` that mean this family."""
    parts: ClassVar[Mapping[str, Part]]
    """The networks of a checkpoint by their folder."""
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {"tokenizer": CLIP}
    """Its tokenizers by their folder."""
    vae_scale: ClassVar[Mapping[str, float]] = {"scaling_factor": 0.18215}
    """What the config of its VAE says of the latents' size: files with nothing but a VAE do not tell it."""
    reference: ClassVar[str | None] = None
    """diffusers' class that `verify` compares with, where it is not the checkpoint's own."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Networks and tokenizers that a checkpoint of the family may lack."""

    @property
    def reads_files(self) -> bool:
        """Whether the family has an original layout of single files."""
        return type(self).open_file is not Family.open_file or type(self).open_network is not Family.open_network

    @property
    def denoiser(self) -> str:
        """The folder of the network that is called once for each step."""
        return next(name for name in ("transformer", "unet", "denoiser") if name in self.parts)

    def open_file(self, file: SingleFile) -> Checkpoint | None:
        """Open a single file of the family's original layout; None for a file of any other layout."""
        return None

    def open_network(self, file: Path, weights: Weights, base: Mapping[str, Any]) -> Component | None:
        """Open a single file with the family's denoiser alone, in its original layout; None for any other file.

        `base` is the config of the denoiser of the checkpoint that the rest comes from, empty where there is none.
        """
        return None

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for an architecture whose graphs would not fit the contracts."""

    def token_lengths(self, checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
        """Return the most tokens of a prompt and the size of the vocabulary, for each tokenizer.

        By default they are the positions and the vocabulary of the encoder beside it: `tokenizer_2`, `text_encoder_2`.
        """
        names = checkpoint.tokenizers
        configs = {name: checkpoint.config(name.replace("tokenizer", "text_encoder")) for name in names}
        return {name: (each["max_position_embeddings"], each["vocab_size"]) for name, each in configs.items()}

    def tokenizer_kinds(self, checkpoint: Checkpoint) -> Mapping[str, TokenizerKind]:
        """Return the kinds of the tokenizers with what a checkpoint says itself, such as a template for prompts."""
        return self.tokenizers

    def tokens(self, checkpoint: Checkpoint, lengths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return the length of a prompt and the size of the vocabulary, by the graph input that token ids feed."""
        sizes = self.token_lengths(checkpoint)
        return {name.replace("tokenizer", "token_ids"): (lengths[name], sizes[name][1]) for name in sizes}

    def vae_graphs(self, checkpoint: Checkpoint, *, masked: bool = False) -> dict[str, Callable[[], Graph]]:
        """Return decoders and image encoder, which with `masked` reads what is kept of a picture as well."""
        graphs = {
            "decoder": lambda: decoder_graph(checkpoint.load("vae")),
            "image_encoder": lambda: image_encoder_graph(checkpoint.load("vae"), masked=masked),
        }
        if (tiny := checkpoint.tiny_decoder) is not None:
            graphs["tiny_decoder"] = lambda: decoder_graph(tiny.component.load(), "tiny_decoder")
        return graphs

    @abstractmethod
    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return what loads each network as a graph, by the graph's name, in the order of a request.

        `lengths` are the tokens of a prompt, for each tokenizer. One graph is loaded at a time.
        """

    @abstractmethod
    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the latent geometry and the size that the checkpoint was trained for."""

    def scheduler(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the scheduler config as diffusers' pipeline of the checkpoint leaves it when it opens it."""
        return dict(checkpoint.scheduler)

    def schedule(self, checkpoint: Checkpoint) -> ScheduleRule | None:
        """Return what diffusers' pipeline hands to the scheduler beside the number of steps; None: nothing."""
        return None

    def inputs(self, checkpoint: Checkpoint) -> tuple[NumbersInput, ...]:
        """Return what graphs read beside token ids and no graph writes: by default an embedded guidance scale."""
        config = checkpoint.config(self.denoiser)
        embedded = config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None
        return EMBEDDED_GUIDANCE if embedded else ()

    def learned_variance(self, checkpoint: Checkpoint) -> bool:
        """Tell whether the denoiser gives, behind the channels of its prediction, as many of the noise's variance."""
        return False

    def masked_input(self, checkpoint: Checkpoint) -> str | None:
        """Return the denoiser's input for a picture and its mask, where it is made for inpainting."""
        return None

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return how predictions are combined: by default classifier-free guidance for a scale above 1."""
        return GuidanceInfo()

    def skip_layers(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Return the layers of the denoiser that requests may have skipped; raises `RequestError` for others."""
        if checkpoint.skip_layers:
            raise RequestError(f"skip_layers is given: layers of {self.title} are not skipped, leave it out")
        return ()

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what the manifest says for requests that do not, where it is not the usual: its fields `default_…`."""
        return {}

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return diffusers' own pipeline of the checkpoint, in float32 on the CPU, as the reference of `verify`."""
        return reference_pipeline(checkpoint, self.reference or checkpoint.pipeline, {})
