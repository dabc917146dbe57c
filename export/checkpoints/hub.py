"""Checkpoints fetched from the model hub into its own cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ...engines.errors import CheckpointError, StorageError, reason
from ...engines.files import DISK_FULL
from ..families import Family
from .checkpoint import Part
from .diffusers_folder import TOKENIZER_FILES, family_of_index, has_component
from .json_files import read_json
from .weight_files import check_variant, has_weights, patterns, variants_named, variants_of

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKENIZER = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
]


def is_hub_id(source: str | Path) -> bool:
    """Return whether a text can be `org/name`."""
    return HUB_ID.fullmatch(str(source)) is not None and not str(source).endswith(".safetensors")


def tokenizer_folder(source: str | Path) -> Path:
    """Return a folder with tokenizer files: `source` itself, its `tokenizer` subfolder, or the same of a hub id."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or not HUB_ID.fullmatch(str(source)):
            raise CheckpointError(f"tokenizer {source} does not exist: give a folder with tokenizer files or a hub id")
        try:
            folder = download(str(source), None, [*TOKENIZER, *(f"tokenizer/{file}" for file in TOKENIZER)])
        except CheckpointError as error:
            raise CheckpointError(
                f"a single file holds no tokenizer, and {source} cannot be fetched ({error}): "
                "pass --tokenizer with a folder that has tokenizer.json, or vocab.json and merges.txt"
            ) from error
    for candidate in (folder, folder / "tokenizer"):
        if any((candidate / file).is_file() for file in TOKENIZER_FILES):
            return candidate
    raise CheckpointError(f"tokenizer {source} has no {' or '.join(TOKENIZER_FILES)}")


def download_checkpoint(repository: str, revision: str | None, variant: str | None, without: tuple[str, ...]) -> Path:
    """Fetch configs and tokenizers, then the weights of each component but those of `without`."""
    folder = download_configs(repository, revision)
    index = read_json(folder / "model_index.json")
    family = family_of_index(folder, index)
    parts = {
        name: part for name, part in family.parts.items() if name not in without and has_component(index, family, name)
    }
    return download_weights(repository, revision, parts, variant, folder)


def download_configs(repository: str, revision: str | None) -> Path:
    """Fetch configs and tokenizers of a family that is known."""
    folder = download(repository, revision, ["model_index.json"])
    return download(repository, revision, _configs(family_of_index(folder, read_json(folder / "model_index.json"))))


def download_weights(
    repository: str, revision: str | None, parts: Mapping[str, Part], variant: str | None, folder: Path
) -> Path:
    """Fetch the weights of components by their subfolder: of the variant where there are such, safetensors where there
    are such. Raises `CheckpointError` for a component that has none, naming the variants that there are.
    """
    check_variant(variant)
    if variant is not None:
        folder = download_variant(repository, revision, parts, variant, folder)
    chosen = variants_of(folder, parts, variant)
    plain = {name: part for name, part in parts.items() if chosen[name] is None}
    folder = download_variant(repository, revision, plain, None, folder)
    for name, part in plain.items():
        if not _plain(folder / name, part):
            others = sorted(variants_named(_listed(repository, revision, folder, name), part))
            hint = f"; it has the variant {' and '.join(others)}: give --variant {others[0]}" if others else ""
            raise CheckpointError(
                f"{repository} has no weights for {name or 'it'}, on the hub or in the local cache{hint}"
            )
    return folder


def download_variant(
    repository: str, revision: str | None, parts: Mapping[str, Part], variant: str | None, folder: Path
) -> Path:
    """Fetch what is missing of the weights of one variant, or of those without: safetensors, else PyTorch's."""
    for ending in ("safetensors", "bin"):
        missing = {name: part for name, part in parts.items() if not has_weights(folder / name, part, variant)}
        names = [p for name, part in missing.items() for p in patterns(name, part, variant, ending)]
        folder = download(repository, revision, names) if names else folder
    return folder


def download(repository: str, revision: str | None, names: list[str]) -> Path:
    """Fetch matching files of a hub repository into the local cache and return its snapshot folder."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names))
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
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise StorageError(
                f"{repository} cannot be put into the hub's cache {constants.HF_HUB_CACHE} ({error.strerror}): "
                "free space, or set HF_HOME to a folder on another disk"
            ) from error
        raise CheckpointError(f"{repository} cannot be fetched from the hub ({reason(error)})") from error
    except Exception as error:  # a transfer that breaks off: the errors of the client have no base that we know
        raise CheckpointError(f"{repository} cannot be fetched from the hub ({reason(error)}): run it again") from error


def _configs(family: Family) -> list[str]:
    configs = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in family.parts)]
    return configs + [f"{folder}/{file}" for folder in family.tokenizers for file in TOKENIZER]


def _plain(folder: Path, part: Part) -> bool:
    """Return whether any weights without a variant are there: a file, or the index of several."""
    names = {file.name for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}*")}
    wanted = [p for ending in ("safetensors", "bin") for p in patterns("", part, None, ending) if "*" not in p]
    return any(name in names for name in wanted)


def _listed(repository: str, revision: str | None, folder: Path, component: str) -> list[str]:
    """Return the names of a component's files, on the hub when it answers, else in the local cache."""
    here = [file.name for file in (folder / component).glob("*")]
    with suppress(Exception):  # only to make a message better
        from huggingface_hub import list_repo_files

        prefix = f"{component}/" if component else ""
        files = list_repo_files(repository, revision=revision)
        here += [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    return here
