"""Networks of checkpoints with all of their weights in memory, to be looked at."""

from __future__ import annotations

from typing import Any

from latentrt.export.checkpoints.checkpoint import Checkpoint
from torch import nn


def loaded(checkpoint: Checkpoint, component: str) -> Any:
    """Return a component's network, its weights read from their files."""
    module = checkpoint.load(component)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if hasattr(parameter, "stored"):
                child._parameters[name] = nn.Parameter(parameter.stored(), requires_grad=False)
    return module
