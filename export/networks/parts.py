"""Networks of diffusers as parts of checkpoints."""

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
