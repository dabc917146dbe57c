"""Files on disk: written whole or not at all, and locked between processes.

What is not finished stands beside its target, with a lock that its process holds:

    .<name>.<8 digits>        a file or folder that becomes <name> in one rename
    .<name>.<8 digits>.lock   free as soon as that process has ended, however it ended
    .<name>.<8 digits>.old    what stood at <name> while a folder takes its place
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import StorageError

UMASK = os.umask(0)
os.umask(UMASK)  # can only be read by setting it, for all threads: once, before there are any

WINDOWS = os.name == "nt"
LOCK, OLD = ".lock", ".old"
DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
"""What the system says of a disk, or a user's share of it, that holds no more."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems say that have no hard links."""


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it; `mode` is subject to the umask.

    Raises `StorageError`, and leaves neither a part of the file nor the temporary one, when that fails. What a process
    that was killed has left of the same file is removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with temporary_beside(path) as temporary:
            _fill(temporary, data, mode)
            temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error


def write_note(path: Path, data: bytes) -> None:
    """Write beside an engine of the cache what can be done without, as `write_atomically` does, for others to read.

    Nothing is written where that fails, nor where the engine has been removed: its folder would come back.
    """
    with suppress(StorageError):
        if path.parent.is_dir():
            write_atomically(path, data, mode=0o644)


def write_new(path: Path, data: bytes) -> bool:
    """Write a file as `write_atomically` does, unless there is one; return whether it was written.

    The file appears whole: no other process sees a part of it, or takes its name. Raises `StorageError`.
    """
    try:
        with temporary_beside(path) as temporary:
            _fill(temporary, data, 0o666)
            return _rename_to_nothing(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error


def _fill(path: Path, data: bytes, mode: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode & ~UMASK)


def _rename_to_nothing(source: Path, target: Path) -> bool:
    """Rename a file unless there is a `target`, and tell whether that was done."""
    try:
        if WINDOWS:
            source.rename(target)  # refuses to replace
        else:
            os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        source.replace(target)
    return True


@contextmanager
def temporary_beside(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new file or folder beside `target`, of this user alone, for what is to be renamed; removed at the end.

    `sweep` removes what is left of it when this process is killed. Raises `OSError` when it cannot be made.
    """
    path = target.with_name(f".{_short(target.name)}.{secrets.token_hex(4)}")
    lock = path.with_name(path.name + LOCK)
    with ExitStack() as stack:
        stack.callback(_remove, lock)
        with suppress(StorageError):  # a file system without locks: what is left there stays
            stack.enter_context(locked(lock))
        stack.callback(_remove, path)
        if folder:
            path.mkdir(mode=0o700)
        else:
            path.touch(mode=0o600, exist_ok=False)
        yield path


def sweep(target: Path, names: str | None = None) -> None:
    """Remove what processes that were killed have left of `target`, and leave alone what a living one works on.

    A folder that was being replaced is put back when nothing has taken its place. With `names`, a regular expression,
    everything of that name in the folder `target` is meant, and nothing is put back.
    """
    folder, pattern = (target.parent, re.escape(_short(target.name))) if names is None else (target, names)
    remains = re.compile(rf"(\.(?:{pattern})\.[0-9a-f]{{8}}){re.escape(LOCK)}")
    with suppress(OSError), os.scandir(folder) as entries:
        locks = [Path(entry) for entry in entries if remains.fullmatch(entry.name) and not entry.is_symlink()]
        for lock in locks:
            _sweep(lock, None if names else target)


def _sweep(lock: Path, target: Path | None) -> None:
    """Remove what belongs to a lock, and the lock, unless its process lives."""
    path = lock.with_name(lock.name.removesuffix(LOCK))
    old = path.with_name(path.name + OLD)
    with suppress(OSError):  # it may be another user's
        with locked(lock, wait=False) as held:
            if not held:
                return
            if target is not None and old.exists() and not os.path.lexists(target):
                old.rename(target)
            for leftover in (path, old, lock):
                _remove(leftover)
        _remove(lock)  # where a file that is open cannot be removed


def _short(name: str) -> str:
    """Return a name that leaves room for what is added to it: file systems take 255 bytes."""
    return name if len(name.encode(errors="surrogateescape")) <= 200 else hashlib.sha256(os.fsencode(name)).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def flush_folder(folder: Path, *, files: bool = True) -> None:
    """Flush a folder's entries, and its `files`, to the disk: a rename after it never shows less than it did before."""
    for path in [*(sorted(folder.iterdir()) if files else ()), folder]:
        if path.is_dir() and (WINDOWS or path != folder):
            continue
        handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes only what may be written
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """Show a file's contents without reading them into memory of their own: pages come and go with the file's cache."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing to map
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            yield contents


def storage_error(path: Path | str, error: OSError) -> StorageError:
    """Return the error of a file or folder that could not be written."""
    return StorageError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` inside the block, alone among processes and threads; yield whether it is held.

    Without `wait`, a lock that another holds yields False at once. A process that dies lets go of its locks. Raises
    `StorageError` where the file system has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    except NotImplementedError as error:
        raise StorageError(
            f"cannot lock {path}: its file system has no locks; choose a place on another one"
        ) from error
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
