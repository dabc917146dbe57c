"""Autoencoders that a checkpoint does not have itself: one in place of its own, a tiny one beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...engines.bundle import LatentInfo
from ...engines.errors import CheckpointError, UnsupportedModelError
from ..families import families
from ..networks.autoencoder import AUTOENCODER_TINY, vae_factor
from ..single_files.vae import open_vae_file
from .checkpoint import Checkpoint, Component, Origin, Part
from .configs import reading
from .hub import download, download_variant, download_weights, is_hub_id
from .json_files import read_json
from .weight_files import has_variant, weight_files
from .weights import PICKLE_REASON, PICKLES, Weights

CONFIGS = ["config.json", "vae/config.json"]
TITLES = {"vae": "VAE", "tiny_decoder": "tiny decoder"}
"""What messages call an autoencoder, by its name in the bundle's record."""


@reading("the VAE")
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
    return _open(source, part, "vae", variant, "a diffusers folder, a .safetensors file or a hub id")


@reading("the tiny decoder")
def with_tiny_decoder(
    checkpoint: Checkpoint, source: str | Path | None, variant: str | None, latent: LatentInfo
) -> Checkpoint:
    """Return a checkpoint with the decoder of diffusers' `AutoencoderTiny` (TAESD) beside its own: a folder, a hub id.

    Raises `CheckpointError` when there is none, `UnsupportedModelError` for one of other latents than `latent`.
    """
    if source is None:
        return checkpoint
    if Path(source).is_file():
        raise CheckpointError(f"tiny decoder {source} is a file: give a diffusers folder or a hub id")
    origin = _open(source, AUTOENCODER_TINY, "tiny_decoder", variant, "a diffusers folder or a hub id")
    config = origin.component.config
    found = (config["latent_channels"], vae_factor(config))
    if found != (latent.channels, latent.downscale):
        raise UnsupportedModelError(
            f"tiny decoder {source} is for latents of {found[0]} channels and {found[1]} pixels a cell, and this "
            f"checkpoint's have {latent.channels} and {latent.downscale}: give the one of its family"
        )
    return replace(checkpoint, tiny_decoder=origin, files={**checkpoint.files, **origin.files})


def _open(source: str | Path, part: Part, what: str, variant: str | None, kinds: str) -> Origin:
    """Open the autoencoder of a folder or hub id; `what` is its name in the bundle's record, `kinds` what it may be."""
    path, title = Path(source), TITLES[what]
    if path.is_dir():
        return _open_folder(path, part, what, str(path.resolve().name), None, variant)
    if path.is_absolute() or not is_hub_id(source):
        raise CheckpointError(f"{title} {source} does not exist: give {kinds}")
    folder = download(str(source), None, CONFIGS)
    where = "" if (folder / "config.json").is_file() else "vae"
    if variant is not None:
        folder = download_variant(str(source), None, {where: part}, variant, folder)
    if variant is None or not has_variant(folder / where, variant):
        folder = download_weights(str(source), None, {where: part}, None, folder)
    return _open_folder(folder, part, what, str(source), folder.name, variant)


def _open_folder(folder: Path, part: Part, what: str, name: str, revision: str | None, variant: str | None) -> Origin:
    own = folder if (folder / "config.json").is_file() else folder / "vae"
    config, title = read_json(own / "config.json"), TITLES[what]
    declared = config.get("_class_name", part.class_name)
    if declared != part.class_name:
        raise CheckpointError(f"{title} {own} is {declared!r}: give an {part.class_name}")
    chosen = variant if variant is not None and has_variant(own, variant) else None
    weights = Weights(weight_files(own, part, chosen))
    return _origin(name, own, revision, Component.of(part, f"{title} {own}", config, weights), weights, what)


def _open_file(file: Path, part: Part) -> Origin:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"VAE {file} is none: give a .safetensors file, a diffusers folder or a hub id")
    weights = Weights([file])
    if (found := open_vae_file(file, weights, part)) is not None:
        return _origin(file.name, file, None, found, weights, "vae")
    raise CheckpointError(f"VAE {file} holds no autoencoder, in the original layout or in diffusers'")


def _origin(name: str, path: Path, revision: str | None, component: Component, weights: Weights, what: str) -> Origin:
    return Origin(name, path, revision, component, {f"{what}/{file.name}": file for file in weights.files})
