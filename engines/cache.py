"""The engine cache: what was built for this machine, keyed by everything that changes it.

    <home>/engines/<graph>-<key>/engine.json   what the engine is for, and size and hash of its files
                                /…             the engine's own files
    <home>/engines/.building/<graph>-<key>     a build in progress; renamed when complete
    <home>/engines/.locks/<graph>-<key>        held by the process that builds

A build that was killed leaves only a folder under `.building`, which the next process that opens the cache removes: its
lock is free. A key that cannot be written as JSON is an error, never a hit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .errors import EngineError, StorageError, is_out_of_memory, reason
from .files import flush_folder, locked, sha256_of, write_atomically, write_note
from .trust import check_trusted

SIDECAR = "engine.json"
CHECKED = "checked.json"
"""Sizes, times and inodes of an engine's files when they were last found to be as built."""

Loaded = TypeVar("Loaded")

log = logging.getLogger(__name__)


def home() -> Path:
    """Return the folder for caches: `$LATENTRT_HOME`, else `$XDG_CACHE_HOME/latentrt`, else `~/.cache/latentrt`."""
    try:
        if given := os.environ.get("LATENTRT_HOME"):
            return Path(given).expanduser().absolute()
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base).absolute() / "latentrt"
        return Path.home().absolute() / ".cache" / "latentrt"
    except (RuntimeError, OSError) as error:  # a user without a home, as containers have them
        raise StorageError("this user has no home folder for the cache: set LATENTRT_HOME to a folder") from error


class EngineCache:
    """Engines on disk under one folder; safe with several processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root.absolute() if root is not None else home() / "engines"

    def find(self, name: str, key: Mapping[str, Any]) -> Path | None:
        """Return the folder of a finished engine with exactly this key, or None.

        Raises `StorageError` when others may have written it; see `engines.trust`.
        """
        folder = self.root / _entry(name, key)
        check_trusted(self.root, folder)
        sidecar = _sidecar(folder)
        if sidecar is None or sidecar.get("key") != _plain(key):
            return None
        if problem := _damage(folder, sidecar):
            log.warning("engine %s is damaged (%s): it is built again", folder, problem)
            return None
        return folder

    def get(self, name: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Path:
        """Return the folder of the engine with this key, calling `build(folder)` when there is none.

        `build` writes the engine's files into the folder it is given and returns facts for the sidecar. The engine
        appears in one rename; of several processes that want it, one builds and the others wait. Raises `StorageError`
        when the cache cannot be written.
        """
        if found := self.find(name, key):
            return found
        entry = _entry(name, key)
        with self._writing():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_trusted(self.root)
            self.sweep()
            with self._lock(entry):
                if found := self.find(name, key):  # built by another process while this one waited
                    return found
                working = self.root / ".building" / entry
                shutil.rmtree(working, ignore_errors=True)
                working.parent.mkdir(mode=0o755, exist_ok=True)
                working.mkdir(mode=0o755)
                check_trusted(self.root, working.parent, working)
                try:
                    facts = _built(working, build)
                    files = {f.name: _describe(f) for f in sorted(working.iterdir()) if f.is_file()}
                    sidecar = {"graph": name, "key": _plain(key), "files": files, **facts}
                    (working / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
                    _protect(working)
                    write_atomically(working / CHECKED, json.dumps(_stamp(working, files)).encode(), mode=0o644)
                    flush_folder(working)
                    final = self.root / entry
                    shutil.rmtree(final, ignore_errors=True)  # a damaged entry
                    working.rename(final)
                    flush_folder(self.root, files=False)
                finally:
                    shutil.rmtree(working, ignore_errors=True)
                return final

    def entries(self) -> list[dict[str, Any]]:
        """Return the sidecars of all finished engines, each with its `folder`, its `bytes` and when it was `built`.

        That is in seconds since 1970. Their files are not checked, only that each sidecar is that of its folder: `find`
        does the rest.
        """
        found = []
        for file in sorted(self.root.glob(f"*/{SIDECAR}")):
            with suppress(OSError):  # removed by another process meanwhile
                size, built = sum(f.stat().st_size for f in file.parent.iterdir() if f.is_file()), file.stat().st_mtime
                sidecar = _sidecar(file.parent)
                if sidecar and _entry(str(sidecar.get("graph")), sidecar["key"]) == file.parent.name:
                    found.append({**sidecar, "folder": file.parent, "bytes": size, "built": built})
        return found

    def verify(self) -> dict[Path, str]:
        """Hash every file of every engine, remove the engines that are damaged, and return what was wrong by folder.

        One that another process builds at this moment is left alone. Raises `StorageError` when the cache is not ours.
        """
        damaged = {}
        for folder in sorted(self.root.glob("*-" + 24 * "[0-9a-f]")):
            check_trusted(self.root, folder)
            sidecar = _sidecar(folder)
            if sidecar is None or _entry(str(sidecar.get("graph")), sidecar["key"]) != folder.name:
                problem: str | None = "its description cannot be read"
            else:
                problem = _damage(folder, sidecar, always=True)
            if problem and self.remove({"folder": folder}):
                damaged[folder] = problem
        return damaged

    def load(
        self,
        built: Callable[[], Path],
        opened: Callable[[Path], Loaded],
        out_of_memory: Callable[[], EngineError],
        advice: str,
    ) -> tuple[Path, Loaded]:
        """Return an engine's folder and what `opened` makes of it, building the engine anew when it does not load.

        An engine may be whole by its hashes and not load all the same. It is built once more; raises `EngineError`,
        with advice, when that does not load either, and at once when memory runs out.
        """
        why = ""
        while True:
            folder = built()
            try:
                return folder, opened(folder)
            except EngineError as error:
                if is_out_of_memory(error):
                    raise out_of_memory() from error
                if why:
                    raise EngineError(f"{error}, although {why}: {advice}") from error
                log.warning("%s: it is built again", error)
            why = "it was built just now" if self.remove({"folder": folder}) else "another process holds it"

    def remove(self, entry: Mapping[str, Any]) -> bool:
        """Remove an engine that `entries` has listed; one whose lock another process holds stays, and gives False.

        Raises `StorageError` when it cannot be removed.
        """
        folder: Path = entry["folder"]
        leaving = self.root / ".building" / folder.name  # swept if this process is killed on the way
        with self._writing(), self._lock(folder.name, wait=False) as held:
            if held:
                shutil.rmtree(leaving, ignore_errors=True)  # what a build that was killed left there
                leaving.parent.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # another process was quicker
                    folder.rename(leaving)
                    shutil.rmtree(leaving)
            return held

    def sweep(self) -> None:
        """Remove what builds that were killed left behind."""
        for leftover in (self.root / ".building").glob("*"):
            with self._lock(leftover.name, wait=False) as held:
                if held:
                    log.info("removing the remains of an interrupted build: %s", leftover.name)
                    shutil.rmtree(leftover, ignore_errors=True)

    def _lock(self, entry: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        return locked(self.root / ".locks" / entry, wait=wait)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            what = error.strerror or error
            advice = "free space, or set LATENTRT_HOME to another folder"
            raise StorageError(f"cannot write the engine cache {self.root} ({what}): {advice}") from error


def _sidecar(folder: Path) -> dict[str, Any] | None:
    """Return what an engine's folder says of itself, or None when that is missing or damaged."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(sidecar, dict) and isinstance(sidecar.get("key"), dict) and isinstance(sidecar.get("files"), dict)
    return sidecar if fits else None


def _built(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Build an engine in `folder` and return its facts.

    Raises `OSError` when the disk is full, of which ONNX Runtime says only that a file could not be written.
    """
    try:
        return build(folder)
    except EngineError:
        with (folder / "probe").open("wb") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        raise


def _protect(folder: Path) -> None:
    """Let nobody but its owner write to an engine's files, whatever the umask says."""
    for file in folder.iterdir():
        file.chmod(stat.S_IMODE(file.stat().st_mode) & ~0o022)


def _describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def _stamp(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return what changes when a file is written, copied or restored; hashing gigabytes at each start would be slow."""
    facts = {name: (folder / name).stat() for name in names}
    return {name: [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino] for name, info in facts.items()}


def _damage(folder: Path, sidecar: Mapping[str, Any], *, always: bool = False) -> str | None:
    """Return what is wrong with an engine's files, or None.

    Files are hashed when they are not those of the last check, by size, time and inode, or `always`.
    """
    try:
        stamp = _stamp(folder, sidecar["files"])
        for name, info in sidecar["files"].items():
            if stamp[name][0] != info["size"]:
                return f"{name} has {stamp[name][0]} bytes where it had {info['size']}"
        try:
            known = json.loads((folder / CHECKED).read_text(encoding="utf-8")) == stamp
        except (OSError, ValueError, RecursionError):
            known = False
        if known and not always:
            return None
        for name, info in sidecar["files"].items():
            if sha256_of(folder / name) != info["sha256"]:
                return f"{name} has other contents than when it was built"
    except (OSError, KeyError, TypeError) as error:
        return reason(error)
    write_note(folder / CHECKED, json.dumps(stamp).encode())  # a cache that cannot be written is checked each time
    return None


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key, sort_keys=True))


def _entry(name: str, key: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:24]}"
