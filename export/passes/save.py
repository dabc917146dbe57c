"""Models written to files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

EXTERNAL_BYTES = 64 << 20
"""Weights above this go to `<graph>.onnx.data`, below they stay in the graph's file."""


def save_model(model: ir.Model, file: Path) -> list[Path]:
    """Write an ONNX model and return its files, the external data last when there is any."""
    weights = model.graph.initializers.values()
    files = [file]
    if sum(value.const_value.nbytes for value in weights if value.const_value) > EXTERNAL_BYTES:
        files.append(file.with_name(file.name + ".data"))
    else:
        ir.external_data.load_to_model(model)
    ir.save(model, file, external_data=files[1].name if files[1:] else None)
    return files
