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
from ..checkpoints.checkpoint import Checkpoint, Component, Origin, Part
from ..checkpoints.tokenizer import CLIP, TokenizerKind
from ..checkpoints.weights import Weights
from ..graph import Graph

FindTokenizer = Callable[[str], Path]
"""Returns a folder with tokenizer files for the family's own hub id of one, unless the user named another."""


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
    optional: ClassVar[tuple[str, ...]] = ()
    """Networks and tokenizers that a checkpoint of the family may lack."""

    @property
    def reads_files(self) -> bool:
        """Whether the family has an original layout of single files."""
        return type(self).open_file is not Family.open_file or type(self).open_network is not Family.open_network

    @property
    def denoiser(self) -> str:
        """The folder of the network that is called once for each step."""
        return next(name for name in ("transformer", "unet", *self.parts) if name in self.parts)

    def open_file(
        self,
        file: Path,
        weights: Weights,
        tokenizer: FindTokenizer,
        prediction_type: str | None,
        replaced: Mapping[str, Origin],
    ) -> Checkpoint | None:
        """Open a single file of the family's original layout; None for a file of any other layout.

        `replaced` are components from somewhere else, which the file need not have.
        """
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
        """Return what graphs read beside token ids and no graph writes, such as the size of the picture."""
        return ()

    def masked_input(self, checkpoint: Checkpoint) -> str | None:
        """Return the denoiser's input for a picture and its mask, where it is made for inpainting."""
        return None

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return how predictions are combined: by default classifier-free guidance for a scale above 1."""
        return GuidanceInfo()

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what the manifest says for requests that do not, where it is not the usual: its fields `default_…`."""
        return {}

    @abstractmethod
    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Return diffusers' own pipeline of the checkpoint, in float32 on the CPU, as the reference of `verify`."""
