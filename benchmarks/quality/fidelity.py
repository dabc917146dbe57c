"""How near one answer is to another: latents and pixels of the same request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.device import Array


@dataclass(frozen=True)
class Fidelity:
    """Distance to the reference: of the final latents, and of the uint8 pictures."""

    latents_relative_error: float
    max_pixel_difference: int
    psnr: float | None
    """Decibels; None when the pictures are equal."""
    ssim: float

    def as_record(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def fidelity(answer: Path, reference: Path) -> Fidelity:
    """Compare two saved answers (.npz with `latents` [B, C, h, w] and `images` uint8 [B, H, W, 3])."""
    with np.load(answer) as a, np.load(reference) as b:
        return Fidelity(
            latents_relative_error=relative_error(a["latents"], b["latents"]),
            max_pixel_difference=int(np.abs(a["images"].astype(np.int16) - b["images"]).max()),
            psnr=psnr(a["images"], b["images"]),
            ssim=float(np.mean([ssim(x, y) for x, y in zip(a["images"], b["images"], strict=True)])),
        )


def relative_error(values: Array, reference: Array) -> float:
    """Return the root-mean-square of the difference over the root-mean-square of the reference."""
    difference = values.astype(np.float64) - reference
    return float(np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(reference.astype(np.float64) ** 2)))


def psnr(values: Array, reference: Array) -> float | None:
    """Return the peak signal-to-noise ratio of uint8 pictures, 10 log10(255² / MSE), in decibels; None when equal."""
    error = float(np.mean((values.astype(np.float64) - reference) ** 2))
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(values: Array, reference: Array) -> float:
    """Return the structural similarity of two uint8 pictures [H, W, 3], the mean over all windows and channels.

    Wang et al. 2004, equation 13, with its 11×11 Gaussian window of standard deviation 1.5, K₁ = 0.01 and K₂ = 0.03.
    """
    from scipy.ndimage import gaussian_filter

    def blur(x: Array) -> Array:
        return np.asarray(gaussian_filter(x, sigma=(1.5, 1.5, 0), radius=(5, 5, 0)))[5:-5, 5:-5]

    x, y = values.astype(np.float64), reference.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())
