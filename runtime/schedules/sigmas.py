"""Ways to space sigmas between the largest and the smallest, and the timestep that belongs to a sigma."""

from __future__ import annotations

from collections.abc import Mapping
from math import gamma
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["beta_quantiles", "respaced_sigmas", "timesteps_from_sigmas"]

RHO = 7.0  # Karras et al. 2022
BETA = 0.6  # Lee et al. 2024


def respaced_sigmas(choice: str, options: Mapping[str, Any], sigmas: NDArray[Any], steps: int) -> NDArray[np.float64]:
    """Space `steps` sigmas between the ends of `sigmas`, or between the options sigma_max and sigma_min where given.

    karras: even in sigma^(1/7) (Karras et al. 2022, equation 5). exponential: even in log sigma; lu: the same, which Lu
    et al. 2022 call uniform in lambda. beta: quantiles of Beta(0.6, 0.6) (Lee et al. 2024).
    """
    largest = float(sigmas[0] if options.get("sigma_max") is None else options["sigma_max"])
    smallest = float(sigmas[-1] if options.get("sigma_min") is None else options["sigma_min"])
    ramp = np.linspace(0, 1, steps)
    if choice == "karras":
        first, last = largest ** (1 / RHO), smallest ** (1 / RHO)
        return (first + ramp * (last - first)) ** RHO
    if choice == "lu":  # in float32, whose rounding may decide a timestep
        first, last = (float(np.log(np.float32(end))) for end in (largest, smallest))
        return np.exp(first + ramp * (last - first))
    if choice == "exponential":
        return np.exp(np.linspace(np.log(largest), np.log(smallest), steps))
    return smallest + beta_quantiles(1 - ramp) * (largest - smallest)


def beta_quantiles(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quantiles of Beta(0.6, 0.6) for probabilities in [0, 1], to about 1e-15.

    On the lower half the distribution function is u * series(x) / (a B(a, a)) with u = x^a (DLMF 8.17.7); it is convex
    in u, so Newton's method from u = p a B(a, a) falls onto the root. The upper half is the mirror image.
    """
    lower = np.minimum(probabilities, 1 - probabilities)
    scale = BETA * gamma(BETA) ** 2 / gamma(2 * BETA)
    k = np.arange(60)
    ratios = (BETA + k) * (1 - BETA + k) / ((BETA + 1 + k) * (k + 1))
    coefficients = np.concatenate([[1.0], np.cumprod(ratios)])  # of 2F1(a, 1 - a; a + 1; x)
    u = lower * scale
    for _ in range(8):
        x = u ** (1 / BETA)
        value = u * np.polynomial.polynomial.polyval(x, coefficients)
        slope = (1 - x) ** (BETA - 1)  # of value: density times scale over du/dx
        u = u - (value - lower * scale) / slope
    x = u ** (1 / BETA)
    return np.where(probabilities <= 0.5, x, 1 - x)


def timesteps_from_sigmas(sigmas: NDArray[np.float64], log_sigmas: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the fractional training timesteps of `sigmas`, interpolated in log sigma ([T], increasing)."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, logs, side="right") - 1, 0, len(log_sigmas) - 2)
    share = (log_sigmas[low] - logs) / (log_sigmas[low] - log_sigmas[low + 1])
    share = np.clip(share, 0, 1)
    return (1 - share) * low + share * (low + 1)
