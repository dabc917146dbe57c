"""Bundles of checkpoints, exported into the cache at their first use.

<home>/bundles/<name>-<precision>-<key>         a bundle
<home>/bundles/.locks/<name>-<precision>-<key>  held by the process that exports it
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..engines.bundle import FORMAT_VERSION, MANIFEST, Precision
from ..engines.cache import home
from ..engines.errors import MissingExtraError
from ..engines.files import locked
from ..engines.progress import Progress, silent
from . import export_checkpoint

__all__ = ["cached_bundle"]

DENOISERS = ("transformer", "unet")
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
    if precision == "auto":
        precision = own_precision(source, revision, options)
    others = {name: described(Path(value)) for name, value in options.items() if isinstance(value, str | Path)}
    key = {
        "source": origin,
        "identity": identity,
        "precision": precision,
        "options": {name: str(value) for name, value in sorted(options.items())},
        "files": others,
        "version": metadata.version("latentrt"),
        "format": FORMAT_VERSION,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
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
    except ModuleNotFoundError as error:
        raise MissingExtraError("export", "opening a checkpoint") from error
    known = {name: value for name, value in options.items() if name in inspect.signature(open_checkpoint).parameters}
    checkpoint = open_checkpoint(source, revision, **known)
    try:
        weights = next(checkpoint.components[name].weights for name in DENOISERS if name in checkpoint.components)
        return PRECISIONS.get(str(weights.raw(next(iter(weights))).dtype), "fp32")
    finally:
        checkpoint.close()


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
