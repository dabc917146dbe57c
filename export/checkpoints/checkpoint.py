"""A checkpoint, opened: networks with their configs and weights, tokenizers, and a scheduler config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .weights import Find, Weights, load_module


@dataclass(frozen=True)
class Part:
    """A kind of network that checkpoints hold.

    class_name   its class in `model_index.json`
    stem         the stem of its weight files
    configured   returns the class whose parameters are its config
    build        makes the network from a complete config
    renames      give other names that a weight of it may have in files
    """

    class_name: str
    stem: str
    configured: Callable[[], Any]
    build: Callable[[Mapping[str, Any]], torch.nn.Module]
    renames: tuple[Callable[[str], str], ...] = ()


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config, completed with its class's defaults, and its weights.

    `find` returns a weight by diffusers' name for it; the default is that files use the same names.
    """

    part: Part
    where: str
    config: Mapping[str, Any]
    weights: Weights
    find: Find

    @classmethod
    def of(
        cls, part: Part, where: str, config: Mapping[str, Any], weights: Weights, find: Find | None = None
    ) -> Component:
        """Return a component with the defaults of its class for what the config leaves out."""
        parameters = inspect.signature(part.configured()).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return cls(part, where, defaults | dict(config), weights, find or weights.get)

    def load(self) -> torch.nn.Module:
        """Build the network with its weights; raises `CheckpointError` for one that is missing or does not fit."""

        def find(name: str) -> torch.Tensor | None:
            names = [name, *(rename(name) for rename in self.part.renames)]
            return next((tensor for tensor in map(self.find, names) if tensor is not None), None)

        try:
            return load_module(lambda: self.part.build(self.config), find, self.where)
        finally:
            self.weights.close()


@dataclass(frozen=True)
class TokenizerSource:
    """A folder with tokenizer files, and the padding token where it is not the tokenizer's own."""

    folder: Path
    pad_id: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; weights are read when a network is loaded.

    `components` and `tokenizers` are named as in diffusers' folder: `unet`, `vae`, `text_encoder`, `tokenizer`, ….
    """

    name: str
    family: str
    """The name of its family."""
    pipeline: str
    """diffusers' class that opens it."""
    components: Mapping[str, Component]
    tokenizers: Mapping[str, TokenizerSource]
    scheduler: Mapping[str, Any]
    files: Mapping[str, Path]
    """Weight files by the name that the bundle records."""
    revision: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of a request that the bundle's manifest gets, where they are not the usual ones."""

    def config(self, component: str) -> Mapping[str, Any]:
        """Return the complete config of a component."""
        return self.components[component].config

    def load(self, component: str) -> Any:
        """Return a component's network, in float32 and ready for inference."""
        return self.components[component].load()
