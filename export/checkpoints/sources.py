"""Where a checkpoint comes from: a folder, a file, or the model hub."""

from __future__ import annotations

from pathlib import Path

from ...engines.errors import CheckpointError, RequestError, UnsupportedModelError
from ..families import families
from .checkpoint import Checkpoint, Origin
from .diffusers_folder import open_folder
from .hub import download_checkpoint, is_hub_id, tokenizer_folder
from .vae import open_vae
from .weight_files import check_variant
from .weights import PICKLE_REASON, PICKLES, Weights

PREDICTION_TYPES = ("epsilon", "v_prediction")


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Open a diffusers folder, a single `.safetensors` file, or a hub id.

    `vae` names the VAE to use, instead of the checkpoint's own where it has one: a folder, a file or a hub id. Raises
    `CheckpointError` with what to do when there is no such checkpoint, it is a pickle, or it is damaged, and
    `RequestError` for an option that the source cannot use.
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
        if variant is not None and vae is None:
            raise RequestError("variant is for diffusers folders and hub ids: a single file has one set of weights")
        return _open_file(path, tokenizer, prediction_type, _replaced(vae, variant))
    if tokenizer or prediction_type:
        raise RequestError(
            "tokenizer and prediction_type are for single .safetensors files: a diffusers folder has both"
        )
    if path.is_dir():
        return open_folder(path, path.resolve().name, variant=variant, replaced=_replaced(vae, variant))
    if path.is_absolute() or not is_hub_id(source):
        raise CheckpointError(
            f"checkpoint {source} does not exist: give a diffusers folder, a .safetensors file or a hub id"
        )
    replaced = _replaced(vae, variant)
    folder = download_checkpoint(str(source), revision, variant, tuple(replaced))
    return open_folder(folder, str(source), folder.name, variant=variant, replaced=replaced)


def _replaced(vae: str | Path | None, variant: str | None) -> dict[str, Origin]:
    return {} if vae is None else {"vae": open_vae(vae, variant)}


def _open_file(
    path: Path, tokenizer: str | Path | None, prediction_type: str | None, replaced: dict[str, Origin]
) -> Checkpoint:
    weights = Weights([path])
    for family in families():
        opened = family.open_file(
            path, weights, lambda own: tokenizer_folder(tokenizer or own), prediction_type, replaced
        )
        if opened is not None:
            return opened
    raise UnsupportedModelError(
        f"{path} is not in the original layout of {', '.join(f.title for f in families() if f.reads_files)}: "
        "give a full checkpoint, or the diffusers folder"
    )
