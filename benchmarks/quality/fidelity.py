"""How near one answer is to another: latents and pixels of the same request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...export.compare import psnr, relative_error, ssim


@dataclass(frozen=True)
class Fidelity:
    """Distance to the reference: of the final latents, and of the uint8 pictures."""

    latents_relative_error: float | None
    """None where a side has none of that shape: diffusers packs those of some transformers."""
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
            latents_relative_error=relative_error(a["latents"], b["latents"])
            if "latents" in a and "latents" in b
            else None,
            max_pixel_difference=int(np.abs(a["images"].astype(np.int16) - b["images"]).max()),
            psnr=psnr(a["images"], b["images"]),
            ssim=float(np.mean([ssim(x, y) for x, y in zip(a["images"], b["images"], strict=True)])),
        )
