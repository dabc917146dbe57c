"""A checkpoint, opened: networks with their configs and weights, tokenizers, and a scheduler config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...engines.errors import UnsupportedModelError
from .configs import Kind, check_config, check_depth, check_plain
from .streamed import Find, load_module, unfilled_module
from .weights import Weights

LAYERS_OF_A_STACK = 2
"""Layers of a stack in a shallow copy: the first and the last."""


@dataclass(frozen=True)
class Part:
    """A kind of network that checkpoints hold.

    class_name   its class in `model_index.json`
    stem         the stem of its weight files
    configured   returns the class whose parameters are its config
    build        makes the network from a complete config
    renames      give other names that a weight of it may have in files
    library      the library of its class in `model_index.json`
    kinds        what the values of its config may be, where this package reads them
    depth        keys of its config that count layers, one inside the other
    stacks       names that the layers of a stack begin with, by the key of its config that counts them
    section      the key of a larger config that holds its own, where it may be a part of a larger model
    """

    class_name: str
    stem: str
    configured: Callable[[], Any]
    build: Callable[[Mapping[str, Any]], torch.nn.Module]
    renames: tuple[Callable[[str], str], ...] = ()
    library: str = "diffusers"
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    depth: tuple[str, ...] = ()
    section: str | None = None
    stacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def pickle_stem(self) -> str:
        """The stem of its weight files in PyTorch's own format."""
        return "pytorch_model" if self.library == "transformers" else self.stem


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its config, completed with its class's defaults, and its weights.

    `find` returns a weight by diffusers' name for it; the default is that files use the same names. `own` are tensors
    of a file that are its own: one that the network does not read makes it another kind of network.
    """

    part: Part
    where: str
    config: Mapping[str, Any]
    weights: Weights
    find: Find
    own: frozenset[str] = field(default=frozenset(), kw_only=True)

    @classmethod
    def of(
        cls,
        part: Part,
        where: str,
        config: Mapping[str, Any],
        weights: Weights,
        find: Find | None = None,
        own: frozenset[str] = frozenset(),
    ) -> Component:
        """Return a component with the defaults of its class for what the config leaves out.

        Raises `CheckpointError` for values that cannot be, `UnsupportedModelError` for quantized networks.
        """
        parameters = inspect.signature(part.configured()).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        section = config.get(part.section) if part.section else None
        complete = defaults | dict(section if isinstance(section, dict) else config)
        check_plain(config, where)
        check_config(complete, part.kinds, where)
        check_depth(complete, part.depth, len(weights), where)
        return cls(part, where, complete, weights, find or weights.get, own=own)

    def shallow(self) -> Component:
        """Return the component with the first and the last layer of each of its stacks."""
        config, find, before = dict(self.config), self.find, dict[str, str]()
        for key, stack in self.part.stacks.items():
            if config[key] > LAYERS_OF_A_STACK:
                before[f"{stack}.1."] = f"{stack}.{config[key] - 1}."
                config[key] = LAYERS_OF_A_STACK

        def find_in_whole(name: str) -> torch.Tensor | None:
            for few, all_of_them in before.items():
                if name.startswith(few):
                    return find(all_of_them + name.removeprefix(few))
            return find(name)

        return replace(self, config=config, find=find_in_whole, own=frozenset())

    def load(self) -> torch.nn.Module:
        """Build the network; its weights stay in their files, which `close` unmaps.

        Raises `CheckpointError` for a weight that is missing, damaged or does not fit, `UnsupportedModelError` for one
        of its own that it does not read.
        """
        module = load_module(lambda: self.part.build(self._options()), self._found, self.where)
        if left := sorted(self.own - self.weights.read):
            raise UnsupportedModelError(
                f"{self.where} has a tensor {left[0]!r}, which an ordinary {self.part.class_name} does not read: it is "
                "of another kind, and would draw other pictures without it"
            )
        return module

    def dtype(self) -> torch.dtype | None:
        """Return the type that its largest weight has in the files, None where it is not there."""
        module = unfilled_module(lambda: self.part.build(self._options()), self.where)
        tensor = self._found(max(module.named_parameters(), key=lambda named: named[1].numel())[0])
        return None if tensor is None else tensor.dtype

    def _found(self, name: str) -> torch.Tensor | None:
        names = [name, *(rename(name) for rename in self.part.renames)]
        return next((tensor for tensor in map(self.find, names) if tensor is not None), None)

    def _options(self) -> dict[str, Any]:
        """Return the config without what its class does not read: where and by what it was written."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}


@dataclass(frozen=True)
class Origin:
    """Where a component comes from that is not the checkpoint's own: what the user gave, and what diffusers opens."""

    name: str
    path: Path
    revision: str | None
    component: Component
    files: Mapping[str, Path]
    """Its weight files by the name that the bundle records."""


@dataclass(frozen=True)
class TokenizerSource:
    """A folder with tokenizer files, and the padding token where it is not the tokenizer's own."""

    folder: Path
    pad_id: int | None = None


@dataclass(frozen=True)
class SingleFile:
    """A file in an original layout, and what it does not hold itself.

    `tokenizer` returns a folder with tokenizer files for a hub id, unless the user named another. `replaced` are
    components from somewhere else, which the file need not have.
    """

    path: Path
    weights: Weights
    tokenizer: Callable[[str], Path]
    prediction_type: str | None = None
    replaced: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """Weight files by the name that the bundle records."""
        return {self.path.name: self.path} | {n: path for o in self.replaced.values() for n, path in o.files.items()}


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
    path: Path
    """The folder or the file that diffusers opens."""
    revision: str | None = None
    variant: str | None = None
    """The variant of the weights that was asked for."""
    replaced: Mapping[str, Origin] = field(default_factory=dict)
    """Components that come from somewhere else."""
    vae_scale: Mapping[str, Any] = field(default_factory=dict)
    """What it says of its latents' size in the words of a VAE's config, where its own VAE is replaced."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `model_index.json` says of the pipeline beside its components."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of a request that the bundle's manifest gets, where they are not the usual ones."""
    skip_layers: tuple[int, ...] | None = None
    """Layers of the denoiser that requests may have skipped; None: `Family.skip_layers` has not chosen them yet."""
    tiny_decoder: Origin | None = None
    """The small autoencoder whose decoder the bundle also gets."""

    def config(self, component: str) -> Mapping[str, Any]:
        """Return the complete config of a component."""
        return self.components[component].config

    def load(self, component: str) -> Any:
        """Return a component's network, in float32 and ready for inference, its weights still in their files."""
        return self.components[component].load()

    def shallow(self) -> Checkpoint:
        """Return the checkpoint with the first and the last layer of each stack of its networks."""
        return replace(self, components={name: each.shallow() for name, each in self.components.items()})

    def close(self) -> None:
        """Unmap all weight files; reading maps them again."""
        beside = () if self.tiny_decoder is None else (self.tiny_decoder.component,)
        for component in (*self.components.values(), *beside):
            component.weights.close()
