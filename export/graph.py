"""One graph of a bundle: what it is called, what goes in and out, and the PyTorch module that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engines.bundle import Precision, Stage, TensorInfo

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Graph:
    """A named graph with its contract.

    A symbolic size is a letter or a multiple of one, such as `8*h`; `smallest` holds the least values that the letters
    have while the module is traced. `limits` bounds the random values of an input: uniform in [0, limit), otherwise
    standard normal. `usual` holds what most requests give to letters that are neither rows nor latent cells, such as
    the tokens `L` of a prompt; such letters come last.
    """

    name: str
    stage: Stage
    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    limits: Mapping[str, float]
    smallest: Mapping[str, int] = field(default_factory=dict)
    usual: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    """What the values of letters are multiples of, where not every whole number will do."""
    layers: int | None = None
    """How many layers of each stack it has, the first and the last; None: all."""

    @property
    def symbols(self) -> list[str]:
        """The letters that the input shapes are made of, in the order of their first use."""
        sizes = (split_size(size) for tensor in self.inputs for size in tensor.shape)
        return list(dict.fromkeys(letter for _, letter in sizes if letter))

    def sizes(self, rows_and_cells: Sequence[int], times: int = 1) -> list[int]:
        """Return values for all letters: those of rows and cells as given, as far as the graph has them.

        The others get `times` their usual value.
        """
        own = [letter for letter in self.symbols if letter not in self.usual]
        values = dict(zip(own, rows_and_cells, strict=False)) | {s: times * n for s, n in self.usual.items()}
        return [-(-values[s] // self.multiples.get(s, 1)) * self.multiples.get(s, 1) for s in self.symbols]

    def random_inputs(self, sizes: Iterable[int], seed: int) -> dict[str, torch.Tensor]:
        """Return random values for every input; `sizes` are the letters' values."""
        value = dict(zip(self.symbols, sizes, strict=True))
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


def network_dtype(precision: Precision) -> Any:
    """Return the element type of the border of a network in a precision."""
    return {"fp32": "float32", "fp16": "float16", "bf16": "float32"}[precision]


def inward(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an input in a network's own type, where that is bfloat16: no graph has it at its border."""
    return tensor.to(dtype) if dtype == torch.bfloat16 else tensor


def outward(tensor: torch.Tensor) -> torch.Tensor:
    """Return an output for a graph's border: float32 in place of bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
