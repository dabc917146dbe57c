"""Files on disk: written whole or not at all, and locked between processes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import StorageError

UMASK = os.umask(0)
os.umask(UMASK)  # can only be read by setting it, for all threads: once, before there are any


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    Raises `StorageError`, and leaves neither a part of the file nor the temporary one, when that fails.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def flush_folder(folder: Path, *, files: bool = True) -> None:
    """Flush a folder's entries, and its `files`, to the disk: a rename after it never shows less than it did before."""
    for path in [*(sorted(folder.iterdir()) if files else ()), folder]:
        if path.is_dir() and (os.name == "nt" or path != folder):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the error of a file or folder that could not be written."""
    return StorageError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` inside the block, alone among processes and threads; yield whether it is held.

    Without `wait`, a lock that another holds yields False at once. A process that dies lets go of its locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
