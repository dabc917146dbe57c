"""A transformer in a single file, in an original layout, read under diffusers' names.

Text encoders, VAE, tokenizers and scheduler come from somewhere else: such files are traded without, or with some.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Component, Part
from ..checkpoints.weights import Weights
from .shapes import read

PREFIXES = ("", "model.diffusion_model.")
BESIDE = ("first_stage_model.", "vae.", "text_encoders.", "conditioner.", "cond_stage_model.")
"""How the names of other parts begin, which files may have beside a transformer."""
PLACES = {"q": 0, "k": 1, "v": 2}
STACKED = re.compile(r"\.(?:to|add)_([qkv])[._]")
"""Parameters of diffusers that the original layouts have one behind the other in one tensor."""

Names = Mapping[str, str]
"""Original names by diffusers', whole or by how they begin."""


@dataclass(frozen=True)
class Layout:
    """How a transformer's parameters are called in an original layout, and what shapes tell of its config.

    title     what messages call the models that have it
    mark      a tensor that they have, and no others
    config    returns diffusers' config of a file's tensors, whose names begin with a prefix
    width     a tensor [E, …] whose first size is the width of queries
    names     names outside the stacks of blocks; others are the same
    blocks    for each stack of diffusers, what it is called and the names inside a block; others are the same
    behind    how the names of parameters begin that stand behind queries, keys and values in one tensor
    swapped   tells of a parameter whether its two halves, scale and shift, are the other way round; the second
              argument is its block's number, or None
    left      tensors that files have and networks do not read
    """

    title: str
    mark: str
    config: Callable[[Weights, str], dict[str, Any]]
    width: str
    names: Names = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Names]] = field(default_factory=dict)
    behind: str | None = None
    swapped: Callable[[str, int | None, Mapping[str, Any]], bool] = lambda name, block, config: False
    left: tuple[str, ...] = ()

    def prefix_in(self, weights: Weights) -> str | None:
        """Return what the names of a file's tensors begin with, None for a file of another layout."""
        return next((each for each in PREFIXES if f"{each}{self.mark}" in weights), None)

    def open(self, file: Path, weights: Weights, part: Part, base: Mapping[str, Any]) -> Component | None:
        """Open a transformer in this layout, None for any other file; `base` is the config of one of its kind.

        What shapes tell of its config is theirs, the rest is the base's. Raises `CheckpointError` for tensors that no
        file of this layout has.
        """
        prefix = self.prefix_in(weights)
        if prefix is None:
            return None
        config = read(weights, lambda weights: self.config(weights, prefix), self.title)
        return Component.of(
            part,
            f"transformer of {file}",
            {**base, **config},
            weights,
            lambda name: self._tensor(weights, name, prefix, config),
            self._own(weights, prefix),
        )

    def _own(self, weights: Weights, prefix: str) -> frozenset[str]:
        """Return the names of the transformer's tensors in a file."""
        names = {name for name in weights if name.startswith(prefix) and not name.startswith(BESIDE)}
        return frozenset(names - {prefix + name for name in self.left})

    def _tensor(self, weights: Weights, name: str, prefix: str, config: Mapping[str, Any]) -> torch.Tensor | None:
        """Return a parameter by diffusers' name for it."""
        stacks = "|".join(map(re.escape, self.blocks))
        block = re.match(rf"({stacks})\.(\d+)\.", name) if stacks else None
        stack, names = self.blocks[block[1]] if block else ("", self.names)
        own = name[block.end() :] if block else name
        new = next((each for each in names if own.startswith(each)), None)
        original = own if new is None else names[new] + own.removeprefix(new)
        tensor = weights.get(prefix + (f"{stack}.{block[2]}.{original}" if block else original))
        if tensor is None:
            return None
        if self.swapped(own, int(block[2]) if block else None, config):
            return torch.cat(tensor.chunk(2)[::-1])
        width = weights.shape(f"{prefix}{self.width}")[0]
        if stacked := STACKED.search(own):
            return tensor[PLACES[stacked[1]] * width :][:width]
        return tensor[3 * width :] if self.behind is not None and own.startswith(self.behind) else tensor


def outside(name: str, block: int | None, config: Mapping[str, Any]) -> bool:
    """Tell of a parameter whether it is the last norm's, whose scale and shift most layouts have swapped."""
    return block is None and name.startswith("norm_out.")
