"""The bundle: a folder with everything the runtime needs and nothing tied to one machine."""

from __future__ import annotations

from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STAGES,
    EightBits,
    FileInfo,
    GraphInfo,
    Manifest,
    Parity,
    Precision,
    Quantization,
    ReferenceInfo,
    Stage,
    TensorInfo,
)
from .reader import Bundle
from .records import (
    Branch,
    GuidanceInfo,
    LatentInfo,
    NumbersInput,
    ScheduleRule,
    ShiftLine,
    SkippedLayers,
    TokenizerInfo,
)
from .writer import atomic_folder, describe_files, write_manifest

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "STAGES",
    "Branch",
    "Bundle",
    "EightBits",
    "FileInfo",
    "GraphInfo",
    "GuidanceInfo",
    "LatentInfo",
    "Manifest",
    "NumbersInput",
    "Parity",
    "Precision",
    "Quantization",
    "ReferenceInfo",
    "ScheduleRule",
    "ShiftLine",
    "SkippedLayers",
    "Stage",
    "TensorInfo",
    "TokenizerInfo",
    "atomic_folder",
    "describe_files",
    "write_manifest",
]
