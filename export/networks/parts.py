"""Networks of diffusers and of transformers as parts of checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..checkpoints.checkpoint import Part
from ..checkpoints.configs import Kind


def diffusers_part(
    class_name: str,
    module: str,
    kinds: Mapping[str, Kind],
    *,
    mended: Callable[[Any], nn.Module] = lambda network: network,
    **options: Any,
) -> Part:
    """Return the part of a class in a module of `diffusers.models`, imported when it is used.

    `kinds` and `options` are a part's; `mended` changes what was built, before it has weights.
    """

    def own_class() -> Any:
        return getattr(importlib.import_module(f"diffusers.models.{module}"), class_name)

    return Part(
        class_name,
        "diffusion_pytorch_model",
        configured=own_class,
        build=lambda config: mended(own_class().from_config(dict(config))),
        kinds=kinds,
        **options,
    )


def transformers_part(
    class_name: str,
    config_class: str,
    kinds: Mapping[str, Kind],
    *,
    network: str | None = None,
    fixed: Mapping[str, Any] = {},
    **options: Any,
) -> Part:
    """Return the part of a class of `transformers`, imported when it is used, with the class of its config.

    `network` is the class to build, where a part of what checkpoints name is enough. `fixed` is what its config has
    whatever a checkpoint says. `kinds` and `options` are a part's.
    """

    def own_class(name: str) -> Any:
        return getattr(importlib.import_module("transformers"), name)

    return Part(
        class_name,
        "model",
        configured=lambda: own_class(config_class),
        build=lambda config: own_class(network or class_name)(own_class(config_class).from_dict({**config, **fixed})),
        library="transformers",
        kinds=kinds,
        **options,
    )
