"""The embedded model: a small latent diffusion model of drawn scenes that ships with latentrt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...engines.bundle import FORMAT_VERSION, Precision, sha256_of
from ...engines.cache import home

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The model as an ordinary diffusers folder."""


def bundle_path(precision: Precision = "fp32") -> Path:
    """Return where the embedded model's bundle belongs: a folder of the cache, named by the checkpoint's contents."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode())
    for file in sorted(p for p in CHECKPOINT.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(CHECKPOINT)} {sha256_of(file)}\n".encode())
    return home() / "bundles" / f"embedded-{precision}-{digest.hexdigest()[:16]}"


def ensure_bundle(precision: Precision = "fp32", **options: Any) -> Path:
    """Return the embedded model's bundle, exporting it into the cache when it is not there yet.

    `options` go to `export_checkpoint`. Raises `MissingExtraError` when it has to be exported without the export extra.
    """
    path = bundle_path(precision)
    if not path.exists():
        from .. import export_checkpoint

        export_checkpoint(CHECKPOINT, path, precision=precision, **options)
    return path
