"""A toy family: CLIP text, a denoiser of its own that also reads the picture's size, a KL autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...engines.bundle import LatentInfo, NumbersInput, Precision, TensorInfo
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Part
from ..graph import Graph, network_dtype
from ..networks.autoencoder import AUTOENCODER_KL, decoder_graph, vae_factor
from ..networks.clip import CLIP_TEXT, text_encoder_graph
from .base import Family


class ToyDenoiser(nn.Module):
    """A convolution whose bias comes from the text, the timestep and the size."""

    def __init__(self, channels: int = 4, width: int = 16, context_width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.text = nn.Linear(context_width, width)
        self.number = nn.Linear(3, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, model_input: Tensor, timestep: Tensor, context: Tensor, size_ids: Tensor) -> Tensor:
        """Return the prediction [R, C, h, w]."""
        numbers = torch.cat([timestep[:, None].to(size_ids.dtype) / 1000, size_ids / 1000], dim=1)
        bias = self.text(context.mean(dim=1)) + self.number(numbers)
        return self.last(torch.tanh(self.first(model_input) + bias[:, :, None, None]))


DENOISER = Part(
    "ToyDenoiser",
    "model",
    configured=lambda: ToyDenoiser,
    build=lambda config: ToyDenoiser(**config),
    library="toy",
)


def denoiser_graph(denoiser: Any, length: int, config: Mapping[str, Any], precision: Precision) -> Graph:
    """Latents [R, C, h, w], timesteps [R], conditioning [R, L, E] and sizes [R, 2] to the prediction [R, C, h, w]."""
    dtype = network_dtype(precision)
    latents = ("R", config["channels"], "h", "w")
    return Graph(
        "denoiser",
        "step",
        denoiser,
        (
            TensorInfo(name="model_input", dtype=dtype, shape=latents),
            TensorInfo(name="timestep", dtype="float32", shape=("R",)),
            TensorInfo(name="context", dtype=dtype, shape=("R", length, config["context_width"])),
            TensorInfo(name="size_ids", dtype=dtype, shape=("R", 2)),
        ),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000, "size_ids": 1000},
    )


class Toy(Family):
    """The toy family; it draws from noise alone."""

    name = "toy"
    title = "Toy"
    pipelines = ("ToyPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {"text_encoder": CLIP_TEXT, "denoiser": DENOISER, "vae": AUTOENCODER_KL}

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` when the denoiser and the autoencoder have different channels."""
        channels, latent = checkpoint.config("denoiser")["channels"], checkpoint.config("vae")["latent_channels"]
        if channels != latent:
            raise UnsupportedModelError(f"the denoiser has {channels} channels where the VAE has {latent}")

    def graphs(
        self, checkpoint: Checkpoint, precision: Precision, lengths: Mapping[str, int]
    ) -> Mapping[str, Callable[[], Graph]]:
        """Return text encoder, denoiser and decoder."""
        length, config = lengths["tokenizer"], checkpoint.config("denoiser")
        return {
            "text_encoder": lambda: text_encoder_graph(checkpoint.load("text_encoder"), length, precision),
            "denoiser": lambda: denoiser_graph(checkpoint.load("denoiser"), length, config, precision),
            "decoder": lambda: decoder_graph(checkpoint.load("vae")),
        }

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the VAE's geometry; a convolution takes every size."""
        factor = vae_factor(checkpoint.config("vae"))
        channels = checkpoint.config("denoiser")["channels"]
        return LatentInfo(
            channels=channels, downscale=factor, size_multiple=factor, default_height=64, default_width=64
        )

    def inputs(self, checkpoint: Checkpoint) -> tuple[NumbersInput, ...]:
        """Return the size ids: height and width of the picture."""
        return (NumbersInput(name="size_ids", values=("height", "width")),)

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Refuse: diffusers has no pipeline of this family."""
        raise UnsupportedModelError("diffusers has no pipeline of the toy family: it cannot be verified")


FAMILY = Toy()
