"""Random weights of unit gain, written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .architectures import Stored

DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}


def write_random_weights(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tables: Mapping[str, torch.Tensor] | None = None,
    *,
    seed: int = 0,
    precision: Stored = "fp32",
) -> None:
    """Write a safetensors file of random weights, one in memory at a time, and of tables that are not random."""
    dtype, code = DTYPES[precision]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            weight = (tables or {}).get(name)
            weight = (_random_weight(name, shape, generator) if weight is None else weight).to(dtype)
            stream.write(weight.reshape(-1).view(torch.uint8).numpy().tobytes())


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a weight of unit gain: variance 1/inputs for matrices and kernels, near one for norms, small otherwise."""
    weight = torch.randn(shape, generator=generator)
    if "embedding.weight" in name:
        return weight * 0.05
    if len(shape) > 1:
        return weight / torch.Size(shape[1:]).numel() ** 0.5
    return 1 + 0.05 * weight if name.endswith(("weight", "running_var")) else 0.05 * weight
