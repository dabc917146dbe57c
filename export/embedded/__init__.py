"""The embedded model: a small latent diffusion model of drawn scenes that ships with latentrt.

It ships twice: as an ordinary diffusers folder, and as the bundle that an export of that folder gives, so that the
first picture needs no PyTorch. `python -m latentrt.export.embedded` writes the bundle anew.
"""

from __future__ import annotations

from pathlib import Path

from ...engines.bundle import MANIFEST, Precision
from ...engines.cache import home
from ...engines.files import sha256_of
from ...engines.progress import Progress, silent

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The model as a diffusers folder."""

BUNDLE = Path(__file__).parent / "bundle"
"""The model as a bundle in fp32."""


def bundle_path(precision: Precision = "fp32") -> Path:
    """Return where the model's bundle is, or belongs: what ships, or a folder of the cache for another precision."""
    if precision == "fp32":
        return BUNDLE
    return home() / "bundles" / f"embedded-{precision}-{sha256_of(BUNDLE / MANIFEST)[:16]}"


def ensure_bundle(precision: Precision = "fp32", *, progress: Progress = silent) -> Path:
    """Return the model's bundle; one that does not ship is exported into the cache when it is not there yet.

    Raises `MissingExtraError` when it has to be exported without the export extra.
    """
    path = bundle_path(precision)
    if not path.exists():
        from .. import export_checkpoint

        export_checkpoint(CHECKPOINT, path, precision=precision, progress=progress)
    return path
