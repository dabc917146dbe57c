"""How large a network's activations grow: whether half precision can hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

HALF_LIMIT = 65504 / 4
"""A quarter of the largest half: real inputs reach further than random ones."""


@contextmanager
def largest_activation(module: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """Watch every submodule's output inside the block; yield what returns the largest magnitude, infinite for NaN."""
    peak = 0.0

    def watch(_: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal peak
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            largest = float(output.detach().abs().max())
            peak = max(peak, largest if largest == largest else float("inf"))

    handles = [child.register_forward_hook(watch) for child in module.modules()]
    try:
        yield lambda: peak
    finally:
        for handle in handles:
            handle.remove()
