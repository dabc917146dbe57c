"""The engine cache: what was built for this machine, keyed by everything that changes it.

    <home>/engines/<graph>-<key>/engine.json   what the engine is for, and how to tell
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import locked

SIDECAR = "engine.json"

log = logging.getLogger(__name__)


def home() -> Path:
    """Return the folder for caches: `$LATENTRT_HOME`, else `$XDG_CACHE_HOME/latentrt`, else `~/.cache/latentrt`."""
    if given := os.environ.get("LATENTRT_HOME"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "latentrt"


class EngineCache:
    """Engines on disk under one folder; safe with several processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else home() / "engines"

    def find(self, name: str, key: Mapping[str, Any]) -> Path | None:
        """Return the folder of a finished engine with exactly this key, or None."""
        folder = self.root / _entry(name, key)
        try:
            sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return folder if isinstance(sidecar, dict) and sidecar.get("key") == _plain(key) else None

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
            self.sweep()
            with self._lock(entry):
                if found := self.find(name, key):  # built by another process while this one waited
                    return found
                working = self.root / ".building" / entry
                shutil.rmtree(working, ignore_errors=True)
                working.mkdir(parents=True)
                try:
                    facts = build(working)
                    sidecar = {"graph": name, "key": _plain(key), **facts}
                    (working / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
                    final = self.root / entry
                    shutil.rmtree(final, ignore_errors=True)  # an entry whose sidecar is damaged
                    working.rename(final)
                finally:
                    shutil.rmtree(working, ignore_errors=True)
                return final

    def entries(self) -> list[dict[str, Any]]:
        """Return the sidecars of all finished engines, each with its `folder` and `bytes`."""
        found = []
        for sidecar in sorted(self.root.glob(f"*/{SIDECAR}")):
            size = sum(f.stat().st_size for f in sidecar.parent.iterdir() if f.is_file())
            try:
                found.append(
                    {**json.loads(sidecar.read_text(encoding="utf-8")), "folder": sidecar.parent, "bytes": size}
                )
            except ValueError:
                continue
        return found

    def remove(self, entry: Mapping[str, Any]) -> bool:
        """Remove an engine that `entries` has listed; one whose lock another process holds stays, and gives False.

        Raises `StorageError` when it cannot be removed.
        """
        folder: Path = entry["folder"]
        leaving = self.root / ".building" / folder.name  # swept if this process is killed on the way
        with self._writing(), self._lock(folder.name, wait=False) as held:
            if held:
                leaving.parent.mkdir(exist_ok=True)
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
            raise StorageError(f"cannot write the engine cache {self.root} ({what}): set LATENTRT_HOME") from error


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key, sort_keys=True))


def _entry(name: str, key: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:24]}"
