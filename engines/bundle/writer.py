"""Bundles written: files described, the manifest, and a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageError
from ..files import sha256_of, storage_error, write_atomically
from .manifest import MANIFEST, FileInfo, Manifest


def describe_files(folder: Path) -> dict[str, FileInfo]:
    """Return size and hash of every file below `folder` but the manifest, by its POSIX path relative to it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): FileInfo(size=p.stat().st_size, sha256=sha256_of(p)) for p in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`."""
    write_atomically(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    An existing `target` is kept until the new folder is complete. Without `replace` it is an error, raised before any
    work is done. Raises `StorageError` when the disk is full or the place cannot be written.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise StorageError(f"{target} already exists: choose another output or allow replacing it with --force")
    if replace and target.exists() and not ((target / MANIFEST).is_file() or not any(target.iterdir())):
        raise StorageError(f"{target} exists and is no bundle: it is not replaced; choose another output")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
