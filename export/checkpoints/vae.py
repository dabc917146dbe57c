"""A VAE that takes the place of a checkpoint's own: a folder, a file in either layout, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from ..families import families
from ..single_files.vae import open_vae_file
from .checkpoint import Component, Origin, Part
from .hub import download, download_weights, is_hub_id
from .json_files import read_json
from .weight_files import patterns, variants_of, weight_files
from .weights import PICKLE_REASON, PICKLES, Weights

CONFIGS = ["config.json", "vae/config.json"]


def open_vae(source: str | Path, variant: str | None = None) -> Origin:
    """Open the VAE that `source` names, to be used instead of a checkpoint's own.

    A folder is one with `config.json` and weights, or a whole diffusers checkpoint, whose `vae` it then is. Raises
    `CheckpointError` when there is no such VAE, and for one that is damaged or of another class.
    """
    path, part = Path(source), next(family.parts["vae"] for family in families() if "vae" in family.parts)
    if path.suffix in PICKLES:
        raise CheckpointError(f"VAE {source}: {PICKLE_REASON}")
    if path.is_file():
        return _open_file(path, part)
    if path.is_dir():
        return _open_folder(path, part, str(path.resolve().name), None, variant)
    if path.is_absolute() or not is_hub_id(source):
        raise CheckpointError(f"VAE {source} does not exist: give a diffusers folder, a .safetensors file or a hub id")
    folder = download(str(source), None, CONFIGS)
    where = "" if (folder / "config.json").is_file() else "vae"
    if variant is not None:
        names = [name for ending in ("safetensors", "bin") for name in patterns(where, part, variant, ending)]
        folder = download(str(source), None, names)
    if variant is None or not _has(folder / where, variant):
        folder = download_weights(str(source), None, {where: part}, None, folder)
    return _open_folder(folder, part, str(source), folder.name, variant)


def _open_folder(folder: Path, part: Part, name: str, revision: str | None, variant: str | None) -> Origin:
    own = folder if (folder / "config.json").is_file() else folder / "vae"
    config = read_json(own / "config.json")
    declared = config.get("_class_name", part.class_name)
    if declared != part.class_name:
        raise CheckpointError(f"VAE {own} is {declared!r}: give an {part.class_name}")
    chosen = variants_of(own.parent, {own.name: part}, variant)[own.name] if variant and _has(own, variant) else None
    weights = Weights(weight_files(own, part, chosen))
    return _origin(name, own, revision, Component.of(part, f"VAE {own}", config, weights), weights)


def _open_file(file: Path, part: Part) -> Origin:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"VAE {file} is none: give a .safetensors file, a diffusers folder or a hub id")
    weights = Weights([file])
    if (found := open_vae_file(file, weights, part)) is not None:
        return _origin(file.name, file, None, found, weights)
    raise CheckpointError(f"VAE {file} holds no autoencoder, in the original layout or in diffusers'")


def _origin(name: str, path: Path, revision: str | None, component: Component, weights: Weights) -> Origin:
    files: Mapping[str, Any] = {f"vae/{file.name}": file for file in weights.files}
    return Origin(name, path, revision, component, files)


def _has(folder: Path, variant: str) -> bool:
    return any(f".{variant}" in file.name for file in folder.iterdir())
