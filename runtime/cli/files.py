"""Files that commands write: complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...engines.errors import StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it; raises `StorageError` and leaves nothing when that fails."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def free_paths(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """Return a new path in `folder` for every picture, numbered behind those that are there; none is overwritten."""
    taken = [int(p.name[9:13]) for p in folder.glob("latentrt-[0-9][0-9][0-9][0-9]-*.png")]
    first = max(taken, default=0) + 1
    return [folder / f"latentrt-{first + i:04d}-seed{seed}.png" for i, seed in enumerate(seeds)]
