"""What a schedule is.

A schedule of n steps has n timesteps and n + 1 decreasing sigmas (noise over signal; for flow models the share of
noise). Values are rounded to float32 where diffusers rounds them: a timestep cut to a whole number can hang on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Options", "Schedule"]

Options = Mapping[str, Any]
"""The options of a scheduler config, complete, and of the request: eta, mu, timesteps, sigmas, churn."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Schedule:
    """timesteps [n], sigmas [n + 1] (empty for samplers that read `alphas_cumprod` [T]), and the first step to run."""

    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    alphas_cumprod: NDArray[np.float64]
    start: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)
