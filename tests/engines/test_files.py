"""Files and folders that appear whole; what killed processes leave, and what living ones hold."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from latentrt.engines import files
from latentrt.engines.errors import EngineError, StorageError, is_out_of_memory, reason
from latentrt.engines.files import (
    LOCK,
    OLD,
    flush_folder,
    locked,
    storage_error,
    sweep,
    temporary_beside,
    write_atomically,
    write_new,
    write_note,
)


def leave(target: Path, *, folder: bool = False, old: bool = False) -> Path:
    """Lay out what a process that was killed leaves of a target."""
    with temporary_beside(target, folder=folder) as path:
        name = path.name
    path = target.with_name(name)
    if folder:
        path.mkdir()
        (path / "half").write_text("x")
    else:
        path.write_text("half")
    path.with_name(name + LOCK).touch()
    if old:
        path.with_name(name + OLD).mkdir()
        (path.with_name(name + OLD) / "manifest.json").write_text("before")
    return path


@pytest.mark.parametrize("name", ["a.png", "[a]*.png", "x" * 240, "猫" * 70])
def test_a_write_removes_what_a_killed_one_has_left_of_the_same_file(tmp_path: Path, name: str) -> None:
    leave(tmp_path / name)
    (tmp_path / ".mine.12345678").write_text("not ours")
    write_atomically(tmp_path / name, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: b"new", ".mine.12345678": b"not ours"}


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode", "found"), [(0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0, 0o640, 0o640)])
def test_files_are_for_whom_the_umask_lets_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int, found: int
) -> None:
    """Though what they are written under is for their owner alone."""
    monkeypatch.setattr(files, "UMASK", umask)
    write_atomically(tmp_path / "a.png", b"new", mode)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == found
    assert write_new(tmp_path / "b.png", b"new")
    assert (tmp_path / "b.png").stat().st_mode & 0o777 == 0o666 & ~umask
    write_note(tmp_path / "c.json", b"new")
    assert (tmp_path / "c.json").stat().st_mode & 0o777 == 0o644 & ~umask
    write_note(tmp_path / "removed" / "c.json", b"new")
    assert not (tmp_path / "removed").exists()


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "bundle", folder=True) as living:
        dead = leave(tmp_path / "bundle", folder=True)
        sweep(tmp_path / "bundle")
        assert living.is_dir() and not dead.exists()
        assert {p.name for p in tmp_path.iterdir()} == {living.name, living.name + LOCK}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_swap_that_was_cut_off_ends_with_one_folder(tmp_path: Path, replaced: bool) -> None:
    target = tmp_path / "bundle"
    leave(target, folder=True, old=True)
    if replaced:
        target.mkdir()
        (target / "manifest.json").write_text("after")
    sweep(target)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "manifest.json").read_text() == ("after" if replaced else "before")


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links need rights on Windows")
def test_a_sweep_follows_no_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / ".a.0123abcd").symlink_to(precious)
    (tmp_path / ".a.0123abcd.lock").touch()
    (tmp_path / ".a.4567abcd.lock").symlink_to(precious / "file")
    sweep(tmp_path / "a")
    assert (precious / "file").read_text() == "x"


def test_a_new_file_takes_no_other_s_place(tmp_path: Path) -> None:
    assert write_new(tmp_path / "a", b"first") and not write_new(tmp_path / "a", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"first")]


@pytest.mark.parametrize("system", ["windows", "no links"])
def test_a_new_file_is_written_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    rename = Path.rename

    def windows_rename(self: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
        return rename(self, target)

    monkeypatch.setattr(os, "link", link)
    if system == "windows":
        monkeypatch.setattr(files, "WINDOWS", True)
        monkeypatch.setattr(Path, "rename", windows_rename)
    assert write_new(tmp_path / "a", b"first") and not write_new(tmp_path / "a", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"first")]


def test_windows_flushes_through_a_handle_that_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There `fsync` of a file that is open for reading fails, and a folder cannot be opened at all."""
    flags: dict[int, int] = {}
    opened, flush, flushed = os.open, os.fsync, []

    def windows_open(path: Path, how: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        handle = opened(path, how)
        flags[handle] = how
        return handle

    def windows_fsync(handle: int) -> None:
        if flags[handle] & (os.O_RDWR | os.O_WRONLY) == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(os.fstat(handle).st_ino)
        flush(handle)

    (tmp_path / "a").write_text("a")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    files.flush_folder(tmp_path)
    assert flushed == [(tmp_path / "a").stat().st_ino]


def test_a_file_system_without_locks_still_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with pytest.raises(StorageError, match="has no locks"), locked(tmp_path / "lock"):
        pass
    remains = leave(tmp_path / "a")
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and remains.exists()  # nobody can tell whose it is


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_atomically, write_new):
        with pytest.raises(StorageError, match="No space left on device; free space or choose another place"):
            write(tmp_path / "a", b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"before")]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 12.0 MiB for an array"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
        RuntimeError("bad allocation"),
        RuntimeError("x.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 8388608"),
        RuntimeError("Available memory of 1024 is smaller than requested bytes of 8388608"),
        ValueError("Error parsing message with type 'onnx.ModelProto': Arena alloc failed"),
        RuntimeError("CUDA failure 2: out of memory"),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_said_with_what_needs_less(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert reason(error).startswith("out of memory: use a smaller size")


def test_other_reasons_stand_as_they_are() -> None:
    assert reason(RuntimeError("no kernel\nat line 3")) == "no kernel"
    assert reason(EngineError("the GPU is out of memory (1 of 2 MiB are free)")).startswith("the GPU is out")
    assert "use a smaller" not in str(storage_error(Path("a"), OSError(errno.ENOSPC, "full")))


@pytest.mark.parametrize("write", [write_atomically, write_new])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], object]
) -> None:
    flush, flushed = os.fsync, []

    def watched(handle: int) -> None:
        flush(handle)
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size, (tmp_path / "a.png").exists()))

    monkeypatch.setattr(os, "fsync", watched)
    write(tmp_path / "a.png", b"whole")
    assert flushed == [((tmp_path / "a.png").stat().st_ino, 5, False)]


def test_a_folder_is_flushed_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(b"x")
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    flush_folder(tmp_path)
    assert sorted(flushed) == sorted(path.stat().st_ino for path in (*files, tmp_path))
    flushed.clear()
    flush_folder(tmp_path, files=False)
    assert flushed == [tmp_path.stat().st_ino]


def test_nobody_can_guess_the_name_of_what_is_being_written(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        random.seed(1)
        with temporary_beside(tmp_path / "a.png") as path:
            names.add(path.name)
            assert files.WINDOWS or path.stat().st_mode & 0o077 == 0
    assert len(names) == 8
