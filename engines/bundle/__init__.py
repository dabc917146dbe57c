"""The bundle: a folder with everything the runtime needs and nothing tied to one machine."""

from __future__ import annotations

from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    FileInfo,
    GraphInfo,
    LatentInfo,
    Manifest,
    Parity,
    Precision,
    Stage,
    TensorInfo,
    TokenizerInfo,
    atomic_folder,
    describe_files,
    sha256_of,
    write_manifest,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Bundle",
    "FileInfo",
    "GraphInfo",
    "LatentInfo",
    "Manifest",
    "Parity",
    "Precision",
    "Stage",
    "TensorInfo",
    "TokenizerInfo",
    "atomic_folder",
    "describe_files",
    "sha256_of",
    "write_manifest",
]
