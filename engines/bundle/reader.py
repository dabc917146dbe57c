"""Bundles opened for reading.

Files are checked against the manifest when they are read, not when the bundle is opened: a warm engine cache never
reads the graphs' weights, and hashing gigabytes on every start would cost seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ..errors import BundleError
from ..files import sha256_of
from .manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest


class Bundle:
    """A bundle opened for reading: its folder and its validated manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and validate a bundle's manifest.

        Raises `BundleError` when the folder is no bundle, is of another format version, or names files outside itself.
        """
        path = Path(path)
        file = path / MANIFEST
        if not path.exists():
            raise BundleError(f"bundle {path} does not exist: give the folder that `latentrt export` wrote")
        if not file.is_file():
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST}; run `latentrt export CHECKPOINT -o BUNDLE`"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be read as JSON ({error}): export the checkpoint again") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{file} has format version {version!r}, this latentrt reads {FORMAT_VERSION}: export again"
            )
        try:
            return cls(path, Manifest.model_validate(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{file} is not valid at {where}: {first['msg']}") from error

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

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking its size and hash (once per opened bundle).

        Raises `BundleError` when the file is missing, was changed, or is a link out of the bundle.
        """
        path = self.path / name
        if name in self._checked:
            return path
        problem = self._problem(name)
        if problem:
            raise BundleError(f"{path} {problem}: export the checkpoint again or restore the file")
        self._checked.add(name)
        return path

    def _problem(self, name: str) -> str | None:
        if name not in self.manifest.files:
            return "is not listed in the manifest"
        info, path = self.manifest.files[name], self.path / name
        if not path.is_file():
            return "is missing"
        if not path.resolve().is_relative_to(self.path.resolve()):
            return "is a link that leaves the bundle's folder"
        if path.stat().st_size != info.size:
            return f"has {path.stat().st_size} bytes where the manifest says {info.size}"
        if sha256_of(path) != info.sha256:
            return "does not match its SHA-256 in the manifest"
        return None

    def problems(self, progress: Callable[[str], None] = lambda name: None) -> dict[str, str]:
        """Check every listed file; return what is wrong with each bad one, by name (empty when all is well)."""
        found = {}
        for name in self.manifest.files:
            progress(name)
            if problem := self._problem(name):
                found[name] = problem
        return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
