"""Bundles of checkpoints, exported into the cache at their first use.

<home>/bundles/<name>-<precision>-<key>         a bundle
<home>/bundles/.locks/<name>-<precision>-<key>  held by the process that exports it
<home>/bundles/.precisions/<key>                what "auto" is for a checkpoint
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..engines.bundle import FORMAT_VERSION, MANIFEST, Precision
from ..engines.cache import home
from ..engines.errors import MissingExtraError, StorageError
from ..engines.files import locked, write_atomically
from ..engines.progress import Progress, silent
from . import export_checkpoint

__all__ = ["cached_bundle"]

FROM_THE_HUB = ("base", "vae", "tokenizer", "tiny_decoder")
"""Options that may be a hub id."""
PRECISIONS: Mapping[str, Precision] = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}


def cached_bundle(
    source: str | Path,
    *,
    precision: Precision | Literal["auto"] = "fp32",
    revision: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Path:
    """Return the bundle of a checkpoint: the one in the cache, or a new one; `options` are those of export_checkpoint.

    `precision` "auto" is that of the weights of its denoiser. It is exported again when the hub has another revision,
    when a file has another size or time, and for another precision, option or version of latentrt. Of several
    processes one exports, and the others wait. Raises as `export_checkpoint` does.
    """
    path, origin = Path(source), str(source)
    identity: Any = None
    if path.exists():
        origin, identity = str(path.resolve()), described(path)
    elif (fetched := _revision(source, revision)) is not None:
        identity = revision = fetched
    others: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, str | Path):
            commit = None
            if name in FROM_THE_HUB and not Path(value).exists():
                commit = _revision(value, revision if name == "base" else None)
            if name == "base" and commit is not None:
                revision = commit  # a file has none of its own
            others[name] = commit or described(Path(value))
    key = {
        "source": origin,
        "identity": identity,
        "options": {name: str(value) for name, value in sorted(options.items())},
        "files": others,
        "version": metadata.version("latentrt"),
        "format": FORMAT_VERSION,
    }
    if precision == "auto":
        precision = _noted_precision(_digest(key), lambda: own_precision(source, revision, options))
    digest = _digest(key | {"precision": precision})
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', path.name)[:60]}-{precision}-{digest[:24]}"
    target = home() / "bundles" / name
    if not (target / MANIFEST).is_file():
        with locked(home() / "bundles" / ".locks" / name):
            if not (target / MANIFEST).is_file():  # exported by another process while this one waited
                export_checkpoint(source, target, precision=precision, revision=revision, progress=progress, **options)
    return target


def own_precision(source: str | Path, revision: str | None, options: Mapping[str, Any]) -> Precision:
    """Return the precision that a checkpoint's denoiser has in its files; fp32 for others that bundles do not have."""
    try:
        from .checkpoints.sources import open_checkpoint
        from .families import family_named
    except ModuleNotFoundError as error:
        raise MissingExtraError("export", "opening a checkpoint") from error
    known = {name: value for name, value in options.items() if name in inspect.signature(open_checkpoint).parameters}
    checkpoint = open_checkpoint(source, revision, **known)
    try:
        denoiser = checkpoint.components[family_named(checkpoint.family).denoiser]
        return PRECISIONS.get(str(denoiser.dtype()), "fp32")
    finally:
        checkpoint.close()


def _noted_precision(key: str, find: Callable[[], Precision]) -> Precision:
    """Return the precision that is noted in the cache for a checkpoint, found and noted where there is none."""
    note = home() / "bundles" / ".precisions" / key
    noted = note.read_text(encoding="utf-8", errors="replace") if note.is_file() else None
    for precision in get_args(Precision):
        if precision == noted:
            return cast(Precision, precision)
    found = find()
    with suppress(StorageError):  # a cache that cannot be written is asked again
        write_atomically(note, found.encode())
    return found


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def described(path: Path) -> list[tuple[str, int, int]]:
    """Return name, bytes and time of a file, or of every file of a folder; nothing for what is not there."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = [(each, each.stat()) for each in files if each.is_file()]
    return [(each.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns) for each, stat in found]


def _revision(source: str | Path, revision: str | None) -> str | None:
    """Return the commit that a hub id stands for, from the hub or its local cache; None for what is no hub id."""
    try:
        from .checkpoints.hub import download, is_hub_id
    except ModuleNotFoundError as error:
        raise MissingExtraError("export", "opening a checkpoint") from error
    return download(str(source), revision, ["model_index.json"]).name if is_hub_id(source) else None
