"""Bundles written: files described, the manifest, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import StorageError
from ..files import OLD, flush_folder, sha256_of, storage_error, sweep, temporary_beside, write_atomically
from .manifest import MANIFEST, FileInfo, Manifest
from .reader import MAX_MANIFEST_BYTES


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

    An existing `target` is kept until the new folder is complete and on the disk. Without `replace` it is an error,
    raised before any work is done, and again when a `target` has appeared meanwhile. With `replace` it must be a bundle
    and nothing else: what a bundle's manifest does not list is never deleted. Raises `StorageError` for those, and when
    the disk is full or the place cannot be written. What a process that was killed has left of `target` is removed.
    """
    target = Path(target).absolute()
    sweep(target)
    _check_target(target, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(target, folder=True) as temporary:
            yield temporary
            temporary.chmod(0o755)
            for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
                flush_folder(folder)
            _check_target(target, replace)  # others may have come and written while this one worked
            _put(temporary, target)
            flush_folder(target.parent, files=False)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error(target, error) from error


def _put(folder: Path, target: Path) -> None:
    """Rename a folder to `target`; what was there is deleted afterwards, or put back when that fails."""
    old = folder.with_name(folder.name + OLD)
    if replacing := target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        if replacing:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, replace: bool) -> None:
    """Raise `StorageError` when a folder must not take the place of what is at `target`."""
    if not os.path.lexists(target):
        return
    if not replace:
        raise StorageError(f"{target} already exists: choose another output or allow replacing it with --force")
    try:
        why = _foreign(target)
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
    if why:
        raise StorageError(f"{target} {why}: it is not replaced; choose another output")


def _foreign(target: Path) -> str | None:
    """Return why a path is more than a bundle of whatever format version, or None; an empty folder is nothing more."""
    if target.is_symlink() or not target.is_dir():
        return "exists and is no bundle but a link or a file"
    found = sorted(path for path in target.rglob("*"))
    if not found:
        return None
    listed = _listed(target / MANIFEST)
    if listed is None:
        return "exists and is no bundle"
    known = {MANIFEST, *listed}
    known |= {folder.as_posix() for name in listed for folder in PurePosixPath(name).parents}
    for path in found:
        if (name := path.relative_to(target).as_posix()) not in known:
            return f"holds {name!r}, which is not of the bundle there"
    return None


def _listed(manifest: Path) -> list[str] | None:
    """Return the files that a manifest of any format version lists, or None when it is no bundle's manifest."""
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("format_version"), int):
        return None
    files, graphs = data.get("files"), data.get("graphs")
    return list(files) if isinstance(files, dict) and isinstance(graphs, list) else None
