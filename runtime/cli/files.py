"""Files that commands write: complete or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from ...engines.errors import StorageError

NUMBERED = re.compile(r"latentrt-(\d{4,})-")

UMASK = os.umask(0)
os.umask(UMASK)  # can only be read by setting it, for all threads: once, before there are any


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it; raises `StorageError` and leaves nothing when that fails."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
        raise _storage_error(path, error) from error
    try:
        write_atomically(path, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")
