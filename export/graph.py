"""One graph of a bundle: what it is called, what goes in and out, and the PyTorch module that it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.bundle import Precision, Stage, TensorInfo
from .networks import Decoder, Denoiser, ImageEncoder, TextEncoder

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Graph:
    """A named graph with its contract.

    A symbolic size is a letter or a multiple of one, such as `8*h`; `multiples` says what the letter itself must be a
    multiple of. `limits` bounds the random values of an input: uniform in [0, limit), otherwise standard normal.
    """

    name: str
    stage: Stage
    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    limits: Mapping[str, float]
    multiples: Mapping[str, int]

    @property
    def symbols(self) -> list[str]:
        """The letters that the input shapes are made of, in the order of their first use."""
        sizes = (split_size(size) for tensor in self.inputs for size in tensor.shape)
        return list(dict.fromkeys(letter for _, letter in sizes if letter))

    def random_inputs(self, sizes: Iterable[int], seed: int) -> dict[str, torch.Tensor]:
        """Return random values for every input; `sizes` are the letters' values, rounded up to their multiples."""
        value = {}
        for letter, size in zip(self.symbols, sizes, strict=True):
            multiple = self.multiples.get(letter, 1)
            value[letter] = math.ceil(size / multiple) * multiple
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        for tensor in self.inputs:
            shape = [factor * value.get(letter, 1) for factor, letter in map(split_size, tensor.shape)]
            limit = self.limits.get(tensor.name)
            if limit is None:
                values = torch.randn(shape, generator=generator)
            else:
                values = torch.rand(shape, generator=generator) * limit
            inputs[tensor.name] = values.to(TORCH_DTYPES[tensor.dtype])
        return inputs


def split_size(size: int | str) -> tuple[int, str]:
    """Return the factor and the letter of a size: `8*h` is (8, "h"), 77 is (77, "")."""
    if isinstance(size, int):
        return size, ""
    factor, _, letter = size.rpartition("*")
    return int(factor or 1), letter


def text_encoder_graph(encoder: Any, length: int, precision: Precision) -> Graph:
    """Token ids [R, L] to conditioning [R, L, E]."""
    config = encoder.config
    return Graph(
        "text_encoder",
        "prompt",
        TextEncoder(encoder),
        (TensorInfo(name="token_ids", dtype="int64", shape=("R", length)),),
        (TensorInfo(name="context", dtype=_network(precision), shape=("R", length, config.hidden_size)),),
        limits={"token_ids": config.vocab_size},
        multiples={},
    )


def denoiser_graph(unet: Any, length: int, precision: Precision) -> Graph:
    """Noisy latents [R, C, h, w], timesteps [R] and conditioning [R, L, E] to the prediction [R, C, h, w]."""
    config, dtype = unet.config, _network(precision)
    latents = ("R", config.in_channels, "h", "w")
    multiple = denoiser_multiple(config)
    return Graph(
        "denoiser",
        "step",
        Denoiser(unet),
        (
            TensorInfo(name="model_input", dtype=dtype, shape=latents),
            TensorInfo(name="timestep", dtype="float32", shape=("R",)),
            TensorInfo(name="context", dtype=dtype, shape=("R", length, config.cross_attention_dim)),
        ),
        (TensorInfo(name="prediction", dtype=dtype, shape=latents),),
        limits={"timestep": 1000},
        multiples={"h": multiple, "w": multiple},
    )


def decoder_graph(vae: Any) -> Graph:
    """Latents [B, C, h, w] to pictures [B, H, W, 3], as bytes and as floats in [0, 1]."""
    factor = vae_factor(vae.config)
    picture = ("B", f"{factor}*h", f"{factor}*w", vae.config.out_channels)
    return Graph(
        "decoder",
        "end",
        Decoder(vae),
        (TensorInfo(name="latents", dtype="float32", shape=("B", vae.config.latent_channels, "h", "w")),),
        (
            TensorInfo(name="image", dtype="uint8", shape=picture),
            TensorInfo(name="pixels", dtype="float32", shape=picture),
        ),
        limits={},
        multiples={},
    )


def image_encoder_graph(vae: Any) -> Graph:
    """A picture [B, H, W, 3] in bytes to mean and standard deviation of its latents [B, C, h, w]."""
    factor = vae_factor(vae.config)
    latents = ("B", vae.config.latent_channels, "h", "w")
    return Graph(
        "image_encoder",
        "image",
        ImageEncoder(vae),
        (TensorInfo(name="image", dtype="uint8", shape=("B", f"{factor}*h", f"{factor}*w", vae.config.in_channels)),),
        (
            TensorInfo(name="latents_mean", dtype="float32", shape=latents),
            TensorInfo(name="latents_std", dtype="float32", shape=latents),
        ),
        limits={"image": 256},
        multiples={},
    )


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return how many pixels a latent cell covers on each side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def denoiser_multiple(config: Mapping[str, Any]) -> int:
    """Return what latent heights and widths must be multiples of: the U-Net halves them once per level but the last."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _network(precision: Precision) -> Any:
    return {"fp32": "float32", "fp16": "float16"}[precision]
