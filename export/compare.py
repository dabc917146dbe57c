"""How near tensors and pictures are to a reference, and how near they must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..engines.bundle import Precision
from ..engines.device import Array
from ..engines.selfcheck import relative_error

EXPORT_BOUND: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest relative error of an exported graph, run without optimizations on the CPU."""

PSNR_BOUND: Mapping[Precision, float] = {"fp32": 45.0, "fp16": 35.0, "bf16": 30.0}
"""Smallest peak signal-to-noise ratio of a picture, in decibels."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor against its reference, with the largest relative error that is allowed."""

    tensor: str
    max_abs_error: float
    relative_error: float
    """Root-mean-square of the difference over root-mean-square of the reference."""
    cosine: float
    nan_count: int
    bound: float

    @property
    def within(self) -> bool:
        """Whether the tensor is finite and inside its bound."""
        return self.nan_count == 0 and self.relative_error <= self.bound


@np.errstate(invalid="ignore")  # infinities give NaN, which no bound accepts
def compare(name: str, values: Array, reference: Array, bound: float) -> TensorReport:
    """Return how far one tensor is from its reference of the same shape.

    Bytes are compared as parts of 255 and may be off by one: a value at a rounding edge may fall on either side.
    """
    a, b = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b / norm) if norm else float(np.array_equal(a, b))
    difference = np.abs(a - b)
    if reference.dtype == np.uint8:
        difference = np.maximum(difference - 1, 0) / 255
    return TensorReport(
        tensor=name,
        max_abs_error=float(difference.max()),
        relative_error=relative_error(values, reference),
        cosine=cosine,
        nan_count=int((~np.isfinite(a)).sum()),
        bound=bound,
    )


def psnr(values: Array, reference: Array) -> float | None:
    """Return the peak signal-to-noise ratio of uint8 pictures, 10 log10(255² / MSE), in decibels; None when equal."""
    error = float(np.mean((values.astype(np.float64) - reference) ** 2))
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(values: Array, reference: Array) -> float:
    """Return the structural similarity of two uint8 pictures [H, W, 3], the mean over all windows and channels.

    Wang et al. 2004, equation 13, with its 11×11 Gaussian window of standard deviation 1.5, K₁ = 0.01 and K₂ = 0.03.
    Sides are 11 pixels or more.
    """
    x, y = values.astype(np.float64), reference.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx**2, _blur(y * y) - my**2, _blur(x * y) - mx * my
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


def _blur(x: Array) -> Array:
    """Return Gaussian means of all 11×11 windows that lie inside a picture."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    height, width = x.shape[0] - 10, x.shape[1] - 10
    rows = sum(weight * x[i : i + height] for i, weight in enumerate(window))
    return np.asarray(sum(weight * rows[:, i : i + width] for i, weight in enumerate(window)))
