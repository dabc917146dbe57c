"""Bundles opened for reading.

Files are checked against the manifest when they are read, not when the bundle is opened: a warm engine cache never
reads the graphs' weights, and hashing gigabytes on every start would cost seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import BundleError, RequestError
from ..files import sha256_of
from .manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest

MAX_MANIFEST_BYTES = 1 << 24
MAX_DEPTH = 16
MAX_TEXT = 1 << 16


class Bundle:
    """A bundle opened for reading: its folder and its validated manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: dict[str, tuple[int, ...]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and validate a bundle's manifest.

        Raises `BundleError` when the folder is no bundle, is of another format version, or names files outside itself,
        `RequestError` for what is no path.
        """
        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"bundle is {path!r:.60}: give the path of the folder that `latentrt export` wrote")
        given, path = path, Path(path)
        try:
            if not path.exists():
                raise BundleError(f"bundle {given} does not exist: give the folder that `latentrt export` wrote")
            path = path.absolute()  # where the process goes later must not matter
            data = _read(path)
        except OSError as error:
            raise BundleError(f"bundle {path} cannot be read ({error.strerror or error})") from error
        file = path / MANIFEST
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{file} has format version {_said(version)}, this latentrt reads {FORMAT_VERSION}: export again"
            )
        if problem := _excess(data):
            raise BundleError(f"{file} {problem}: export the checkpoint again")
        try:
            return cls(path, Manifest.model_validate(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{file} is not valid at {_said(where)}: {_said(first['msg'], 400)}") from error

    def graph(self, name: str) -> GraphInfo:
        """Return the graph called `name`, or raise `BundleError`."""
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        names = ", ".join(g.name for g in self.manifest.graphs)
        raise BundleError(f"bundle {self.path} has no graph {name!r}: it has {names}")

    def has_graph(self, name: str) -> bool:
        """Tell whether the bundle has a graph called `name`."""
        return any(graph.name == name for graph in self.manifest.graphs)

    def digest(self, graph: GraphInfo) -> str:
        """Return one SHA-256 over the hashes of a graph's files: what an engine of it is keyed by."""
        return hashlib.sha256("".join(self.manifest.files[f].sha256 for f in graph.files).encode()).hexdigest()

    def nbytes(self, graph: GraphInfo) -> int:
        """Return the bytes of a graph's files."""
        return sum(self.manifest.files[name].size for name in graph.files)

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking its size and hash, which is done anew once it was changed.

        A link is followed: what counts is the hash. Raises `BundleError` when the file is missing or was changed.
        """
        path = self.path / name
        stamp = _stamp(path)  # before the hash: what is written meanwhile is found the next time
        if stamp is not None and self._checked.get(name) == stamp:
            return path
        if problem := self._problem(name):
            raise BundleError(f"{path} {problem}: export the checkpoint again or restore the file")
        if stamp is not None:
            self._checked[name] = stamp
        return path

    def _problem(self, name: str) -> str | None:
        if name not in self.manifest.files:
            return "is not listed in the manifest"
        info, path = self.manifest.files[name], self.path / name
        try:
            if not path.is_file():
                return "is missing"
            if (size := path.stat().st_size) != info.size:
                return f"has {size} bytes where the manifest says {info.size}"
            if sha256_of(path) != info.sha256:
                return "does not match its SHA-256 in the manifest"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        return None

    def problems(self, progress: Callable[[str], None] = lambda name: None) -> dict[str, str]:
        """Check every listed file; return what is wrong with each bad one, by name (empty when all is well)."""
        found = {}
        for name in self.manifest.files:
            progress(name)
            if problem := self._problem(name):
                found[name] = problem
        return found


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written, copied or restored; None for one that cannot be reached."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def _read(path: Path) -> Any:
    """Return the JSON value of a bundle's manifest; raises `BundleError`."""
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; run `latentrt export CHECKPOINT -o BUNDLE`")
    with file.open("rb") as stream:
        text = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} is too large: a manifest has at most {MAX_MANIFEST_BYTES} bytes; export again")
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise BundleError(f"{file} is nested too deeply: export the checkpoint again") from error
    except ValueError as error:
        raise BundleError(f"{file} cannot be read as JSON ({_said(error)}): export the checkpoint again") from error


def _excess(data: Any) -> str | None:
    """Return in what a JSON value goes beyond every manifest that is in earnest, or None."""
    level = [data]
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inside += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, str) and len(value) > MAX_TEXT:
                return f"has a text of {len(value)} characters"
            elif isinstance(value, int) and abs(value) >= 2**63:
                return "has a number of more than 64 bits"
        if not inside:
            return None
        level = inside
    return "is nested too deeply"


def _said(text: object, most: int = 100) -> str:
    """Return the beginning of a text that strangers wrote, on one line."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= most else f"{shown[:most]}…"


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is too large a number")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
