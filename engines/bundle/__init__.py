"""The bundle: a folder with everything the runtime needs and nothing tied to one machine."""

from __future__ import annotations

from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STAGES,
    FileInfo,
    GraphInfo,
    LatentInfo,
    Manifest,
    NumbersInput,
    Parity,
    Precision,
    ReferenceInfo,
    ScheduleRule,
    ShiftLine,
    Stage,
    TensorInfo,
    TokenizerInfo,
)
from .reader import Bundle
from .writer import atomic_folder, describe_files, write_manifest

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "STAGES",
    "Bundle",
    "FileInfo",
    "GraphInfo",
    "LatentInfo",
    "Manifest",
    "NumbersInput",
    "Parity",
    "Precision",
    "ReferenceInfo",
    "ScheduleRule",
    "ShiftLine",
    "Stage",
    "TensorInfo",
    "TokenizerInfo",
    "atomic_folder",
    "describe_files",
    "write_manifest",
]
