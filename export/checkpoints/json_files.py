"""JSON files of checkpoints, read with limits: what is too large, too deep or no text is one line, not a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from .configs import said_by

MAX_BYTES = 64 << 20
"""The index of a very large sharded network is below 1 MiB."""
MAX_DEPTH = 32


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises `CheckpointError` when it is missing or damaged."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: give a complete diffusers checkpoint folder")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes where {MAX_BYTES} are allowed")
        data = json.loads(file.read_text(encoding="utf-8"))
        _check(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({said_by(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return data


def _check(data: Any) -> None:
    """Raise `ValueError` for what Python parses and no manifest can hold: deep nesting and halves of characters."""
    layer = [data]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in layer:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        layer = inner
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
