"""Where a checkpoint comes from: a folder, a file, or the model hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...engines.errors import CheckpointError, RequestError, UnsupportedModelError
from ..families import families, family_named
from .checkpoint import Checkpoint, Component, Origin, SingleFile
from .configs import reading
from .diffusers_folder import family_of_index, open_folder
from .hub import download_checkpoint, download_configs, is_hub_id, tokenizer_folder
from .json_files import read_json
from .vae import open_vae
from .weight_files import check_variant
from .weights import PICKLE_REASON, PICKLES, Weights

PREDICTION_TYPES = ("epsilon", "v_prediction")


@reading("the checkpoint")
def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """Open a diffusers folder, a single `.safetensors` file, or a hub id.

    `vae` names the VAE to use, instead of the checkpoint's own where it has one: a folder, a file or a hub id. `base`
    is the diffusers folder or hub id with all that a file with a denoiser alone lacks. Raises `CheckpointError` with
    what to do when there is no such checkpoint, it is a pickle, or it is damaged, and `RequestError` for an option that
    the source cannot use.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise RequestError(f"prediction_type is {prediction_type!r}: choose {' or '.join(PREDICTION_TYPES)}")
    check_variant(variant)
    path = Path(source)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{source}: {PICKLE_REASON}")
    if path.suffix == ".gguf":
        raise UnsupportedModelError(f"{source} is a GGUF file, whose weights are quantized: give the .safetensors one")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{source} is no checkpoint: give a .safetensors file, a diffusers folder or a hub id"
            )
        if base is not None:
            if tokenizer or prediction_type:
                raise RequestError("tokenizer and prediction_type are what base has: leave them or it out")
            return _scaled(_open_network(path, base, revision, _replaced(vae, variant), variant))
        if variant is not None and vae is None:
            raise RequestError("variant is for diffusers folders and hub ids: a single file has one set of weights")
        return _scaled(_open_file(path, tokenizer, prediction_type, _replaced(vae, variant)))
    if base is not None:
        raise RequestError("base is for a single .safetensors file with a denoiser alone: a diffusers folder has all")
    if tokenizer or prediction_type:
        raise RequestError(
            "tokenizer and prediction_type are for single .safetensors files: a diffusers folder has both"
        )
    if not path.is_dir() and (path.is_absolute() or not is_hub_id(source)):
        raise CheckpointError(
            f"checkpoint {source} does not exist: give a diffusers folder, a .safetensors file or a hub id"
        )
    replaced = _replaced(vae, variant)
    return _scaled(_open_folder(source, revision, replaced, variant))


def _open_folder(
    source: str | Path, revision: str | None, replaced: dict[str, Origin], variant: str | None
) -> Checkpoint:
    """Open a diffusers folder or a hub id."""
    path = Path(source)
    if path.is_dir():
        return open_folder(path, path.resolve().name, variant=variant, replaced=replaced)
    folder = download_checkpoint(str(source), revision, variant, tuple(replaced))
    return open_folder(folder, str(source), folder.name, variant=variant, replaced=replaced)


def _replaced(vae: str | Path | None, variant: str | None) -> dict[str, Origin]:
    return {} if vae is None else {"vae": open_vae(vae, variant)}


def _open_file(
    path: Path, tokenizer: str | Path | None, prediction_type: str | None, replaced: dict[str, Origin]
) -> Checkpoint:
    weights = Weights([path])
    file = SingleFile(path, weights, lambda own: tokenizer_folder(tokenizer or own), prediction_type, replaced)
    for family in families():
        if (opened := family.open_file(file)) is not None:
            return opened
    for family in families():
        if family.open_network(path, weights, {}) is not None:
            raise CheckpointError(
                f"{path} is read for nothing but the {family.denoiser} of {family.title}: give the rest with --base, a "
                "diffusers folder or hub id of the model that it was made from"
            )
    raise UnsupportedModelError(
        f"{path} is not in the original layout of {', '.join(f.title for f in families() if f.reads_files)}: "
        "give a full checkpoint, or the diffusers folder"
    )


def _open_network(
    path: Path, base: str | Path, revision: str | None, replaced: dict[str, Origin], variant: str | None
) -> Checkpoint:
    """Open a checkpoint with the denoiser of a single file in place of its own, whose weights it need not have."""
    folder = Path(base)
    if not folder.is_dir():
        if folder.is_absolute() or not is_hub_id(base):
            raise CheckpointError(f"base {base} does not exist: give a diffusers folder or a hub id")
        folder = download_configs(str(base), revision)
    family = family_of_index(folder, read_json(folder / "model_index.json"))
    config = read_json(folder / family.denoiser / "config.json")
    weights = Weights([path])
    network = family.open_network(path, weights, config)
    if network is None:
        raise UnsupportedModelError(
            f"{path} has no {family.denoiser} of {family.title}, the family of {base}, in its original layout"
        )
    origin = Origin(path.name, path, None, network, {f"{family.denoiser}/{path.name}": path})
    return _open_folder(base, revision, replaced | {family.denoiser: origin}, variant)


def _scaled(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose VAE, where it is a file of its own, has the scale of the one in whose place it is.

    What the checkpoint does not say of it is as in its family.
    """
    vae = checkpoint.replaced.get("vae")
    if vae is None or vae.path.is_dir():
        return checkpoint
    own = vae.component
    config = {**own.config, **family_named(checkpoint.family).vae_scale, **checkpoint.vae_scale}
    mended = replace(vae, component=Component.of(own.part, own.where, config, own.weights, own.find))
    return replace(
        checkpoint,
        components={**checkpoint.components, "vae": mended.component},
        replaced={**checkpoint.replaced, "vae": mended},
    )
