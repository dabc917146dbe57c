"""How near one answer is to another: latents and pixels of the same request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.device import Array
from ...export.compare import haarpsi, max_difference, psnr, relative_error, ssim


@dataclass(frozen=True)
class Fidelity:
    """Distance to the reference: of the final latents, and of the uint8 pictures."""

    pictures: int
    latents_relative_error: float | None
    """None where a side has none of that shape: diffusers packs those of some transformers."""
    max_pixel_difference: int
    psnr: float | None
    """Decibels, of all pictures together; None when they are equal."""
    least_psnr: float | None
    """That of the picture that is furthest from its own."""
    ssim: float
    """Structural similarity, the mean over pictures."""
    haarpsi: float
    """Haar wavelet-based perceptual similarity, the mean over pictures."""

    def as_record(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def fidelity(answer: Path, reference: Path) -> Fidelity:
    """Compare two saved answers (.npz with `images` uint8 [B, H, W, 3], and maybe `latents` [B, C, h, w])."""
    with np.load(answer) as a, np.load(reference) as b:
        latents = relative_error(a["latents"], b["latents"]) if "latents" in a and "latents" in b else None
        return compare_pictures(a["images"], b["images"], latents)


def compare_pictures(pictures: Array, reference: Array, latents: float | None = None) -> Fidelity:
    """Compare uint8 pictures [B, H, W, 3]; `latents` is the relative error of those that they were decoded from."""
    pairs = list(zip(pictures, reference, strict=True))
    each = [psnr(a, b) for a, b in pairs]
    return Fidelity(
        pictures=len(pairs),
        latents_relative_error=latents,
        max_pixel_difference=max_difference(pictures, reference),
        psnr=psnr(pictures, reference),
        least_psnr=min((value for value in each if value is not None), default=None),
        ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
        haarpsi=float(np.mean([haarpsi(a, b) for a, b in pairs])),
    )
