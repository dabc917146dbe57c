"""Where a checkpoint comes from: a folder, a file, or the model hub."""

from __future__ import annotations

import re
from pathlib import Path

from ...engines.errors import CheckpointError, RequestError, UnsupportedModelError, reason
from ..families import Family, families
from .checkpoint import Checkpoint
from .diffusers_folder import TOKENIZER_FILES, VARIANTS, family_of_index, open_folder, read_json
from .weights import PICKLE_REASON, PICKLES, Weights

PREDICTION_TYPES = ("epsilon", "v_prediction")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKENIZER = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Open a diffusers folder, a single `.safetensors` file, or a hub id.

    Raises `CheckpointError` with what to do when there is no such checkpoint, it is a pickle, or it is damaged, and
    `RequestError` for an option that the source cannot use.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise RequestError(f"prediction_type is {prediction_type!r}: choose {' or '.join(PREDICTION_TYPES)}")
    path = Path(source)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{source}: {PICKLE_REASON}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{source} is no checkpoint: give a .safetensors file, a diffusers folder or a hub id"
            )
        return _open_file(path, tokenizer, prediction_type)
    if tokenizer or prediction_type:
        raise RequestError(
            "tokenizer and prediction_type are for single .safetensors files: a diffusers folder has both"
        )
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.is_absolute() or path.suffix == ".safetensors" or not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"checkpoint {source} does not exist: give a diffusers folder, a .safetensors file or a hub id"
        )
    folder = _download_checkpoint(str(source), revision)
    return open_folder(folder, str(source), folder.name)


def _open_file(path: Path, tokenizer: str | Path | None, prediction_type: str | None) -> Checkpoint:
    weights = Weights([path])
    for family in families():
        opened = family.open_file(path, weights, lambda own: tokenizer_folder(tokenizer or own), prediction_type)
        if opened is not None:
            return opened
    raise UnsupportedModelError(
        f"{path} is not in the original layout of {', '.join(family.title for family in families())}: "
        "give a full checkpoint, or the diffusers folder"
    )


def tokenizer_folder(source: str | Path) -> Path:
    """Return a folder with tokenizer files: `source` itself, its `tokenizer` subfolder, or the same of a hub id."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or not HUB_ID.fullmatch(str(source)):
            raise CheckpointError(f"tokenizer {source} does not exist: give a folder with tokenizer files or a hub id")
        try:
            folder = _download(str(source), None, [*TOKENIZER, *(f"tokenizer/{file}" for file in TOKENIZER)])
        except CheckpointError as error:
            raise CheckpointError(
                f"a single file holds no tokenizer, and {source} cannot be fetched ({error}): "
                "pass --tokenizer with a folder that has tokenizer.json, or vocab.json and merges.txt"
            ) from error
    for candidate in (folder, folder / "tokenizer"):
        if any((candidate / file).is_file() for file in TOKENIZER_FILES):
            return candidate
    raise CheckpointError(f"tokenizer {source} has no {' or '.join(TOKENIZER_FILES)}")


def _download_checkpoint(repository: str, revision: str | None) -> Path:
    """Fetch configs and tokenizers, then each component's full-precision weights, or else its half-precision ones."""
    folder = _download(repository, revision, ["model_index.json"])
    family = family_of_index(folder, read_json(folder / "model_index.json"))
    folder = _download(repository, revision, _config_patterns(family))
    wanted = dict(family.parts)
    for variant in VARIANTS:
        patterns = [p for component, part in wanted.items() for p in _weight_patterns(component, part.stem, variant)]
        if patterns:
            folder = _download(repository, revision, patterns)
        wanted = {name: part for name, part in wanted.items() if not any((folder / name).glob("*.safetensors"))}
    if wanted:
        raise CheckpointError(
            f"{repository} has no .safetensors weights for {', '.join(wanted)}, on the hub or in the local cache; "
            f"{PICKLE_REASON}"
        )
    return folder


def _config_patterns(family: Family) -> list[str]:
    configs = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in family.parts)]
    return configs + [f"{folder}/{file}" for folder in family.tokenizers for file in TOKENIZER]


def _weight_patterns(part: str, stem: str, variant: str) -> list[str]:
    return [
        f"{part}/{stem}{variant}.safetensors",
        f"{part}/{stem}{variant}-*-of-*.safetensors",
        f"{part}/{stem}{variant}.safetensors.index.json",
        f"{part}/{stem}.safetensors.index{variant}.json",
    ]


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch matching files of a hub repository into the local cache and return its snapshot folder."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{repository} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a local path nor a repository of the hub that you may read: "
            "check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}: give a branch, tag or commit") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repository}{at} is no local path and not in the local cache, "
            "and the hub cannot be reached: connect (with HF_HUB_OFFLINE unset) or give a local folder"
        ) from error
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise CheckpointError(f"{repository} cannot be fetched from the hub ({reason(error)})") from error
