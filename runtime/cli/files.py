"""Numbered picture files."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from ...engines.files import storage_error, write_atomically

NUMBERED = re.compile(r"latentrt-(\d{4,})-")


def write_numbered(folder: Path, seed: int, data: bytes) -> Path:
    """Write a picture to a new file, numbered behind those that are in `folder`, and return its path.

    The name is taken before the picture is written, so no other process takes it; raises `StorageError`.
    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(match[1]) for p in folder.glob("latentrt-*.png") if (match := NUMBERED.match(p.name))]
            path = folder / f"latentrt-{max(taken, default=0) + 1:04d}-seed{seed}.png"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                break
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        write_atomically(path, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
