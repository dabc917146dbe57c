"""ONNX files read as graphs that can be rewritten, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MissingExtraError

if TYPE_CHECKING:
    from onnx import ModelProto


def load_graph(path: Path, extra: str) -> ModelProto:
    """Read an ONNX file without its external data; `extra` brings the package that this takes.

    Raises `MissingExtraError` when that package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(extra, "rewriting a graph for this backend") from error
    return onnx.load(path, load_external_data=False)
