"""What the checks of families have in common: whether the networks of a checkpoint fit together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.configs import shown


def check_channels(
    checkpoint: Checkpoint, component: str, allowed: Collection[tuple[int, int]], than: str, advice: str
) -> None:
    """Raise `UnsupportedModelError` for a denoiser that takes and gives other channels than one of the `allowed` pairs.

    `than` says what the channels should be, `advice` which checkpoints have others.
    """
    config = checkpoint.config(component)
    taken, given = config["in_channels"], config["out_channels"] or config["in_channels"]
    if (taken, given) not in allowed:
        kind = "U-Net" if component == "unet" else component
        raise UnsupportedModelError(
            f"{checkpoint.components[component].where}: the {kind} takes {taken} and gives {given} channels where "
            f"{than}: {advice}"
        )


def check_equal(checkpoint: Checkpoint, component: str, key: str, wanted: Any, giver: str) -> None:
    """Raise `CheckpointError` for a number of a config that is not what another network gives."""
    if (found := checkpoint.config(component)[key]) != wanted:
        raise CheckpointError(
            f"{checkpoint.components[component].where}: {key} is {shown(found)} where {giver} gives {shown(wanted)}: "
            "the parts belong to different checkpoints"
        )


def check_axes(checkpoint: Checkpoint, count: int) -> None:
    """Raise `CheckpointError` where a transformer's rotary axes are not so many, or not a head wide."""
    config = checkpoint.config("transformer")
    if sum(config["axes_dims_rope"]) != config["attention_head_dim"] or len(config["axes_dims_rope"]) != count:
        raise CheckpointError(
            f"{checkpoint.components['transformer'].where}: axes_dims_rope {shown(config['axes_dims_rope'])} are not "
            f"{count} numbers of which attention_head_dim {config['attention_head_dim']} is the sum"
        )
