"""Which files hold a component's weights: shards, variants and formats in the order in which diffusers takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...engines.errors import CheckpointError, RequestError
from .checkpoint import Part
from .configs import shown
from .json_files import read_json

VARIANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}")


def check_variant(variant: str | None) -> None:
    """Raise `RequestError` for what cannot be a part of a file's name."""
    if variant is not None and not VARIANT.fullmatch(variant):
        raise RequestError(f"variant is {variant!r}: give the word before the file's ending, such as fp16 or non_ema")


def variants_of(folder: Path, parts: Mapping[str, Part], variant: str | None) -> dict[str, str | None]:
    """Return the variant that each component is read in: the one asked for, where the component has files of it.

    Raises `CheckpointError` when no component has.
    """
    if variant is None:
        return dict.fromkeys(parts)
    having = {name for name in parts if has_variant(folder / name, variant)}
    if not having:
        other = sorted({found for name, part in parts.items() for found in _variants(folder / name, part)})
        known = f"there are {', '.join(other)}" if other else "there are none, leave --variant out"
        raise CheckpointError(f"{folder} has no weights of the variant {variant!r}: {known}")
    return {name: variant if name in having else None for name in parts}


def has_variant(folder: Path, variant: str) -> bool:
    """Tell whether a component has files of a variant, by their names alone, as diffusers does."""
    return any("." in name and name.split(".")[1].startswith(variant) for name in _names(folder))


def has_weights(folder: Path, part: Part, variant: str | None = None) -> bool:
    """Tell whether all files of a component's weights are there: of its shards, every one that the index names."""
    try:
        return bool(weight_files(folder, part, variant))
    except CheckpointError:
        return False


def weight_files(folder: Path, part: Part, variant: str | None = None) -> list[Path]:
    """Return the files of a component's weights: safetensors, else PyTorch's `.bin`; the shards when they are split.

    Raises `CheckpointError` when there are none, naming the variants that there are.
    """
    for stem, ending in ((part.stem, "safetensors"), (part.pickle_stem, "bin")):
        whole = folder / _with_variant(f"{stem}.{ending}", variant)
        indexes = [folder / name for name in _indexes(stem, ending, variant)]
        found = [index for index in indexes if index.is_file()]
        if whole.is_file() and not (found and part.library == "diffusers"):  # which takes the shards of the two
            return [whole]
        if found:
            return _shards(found[0])
    wanted = _with_variant(f"{part.stem}.safetensors", variant)
    if others := sorted(_variants(folder, part) - {variant}):
        asked = f" of the variant {variant!r}" if variant else ""
        raise CheckpointError(
            f"{folder} has no weights{asked} ({wanted}), but those of the variant {' and '.join(others)}: "
            f"give --variant {others[0]}"
        )
    raise CheckpointError(f"{folder} has no {wanted}: the checkpoint is incomplete")


def patterns(folder: str, part: Part, variant: str | None, ending: str) -> list[str]:
    """Return the names under which a hub repository may hold a component's weights."""
    stem = part.stem if ending == "safetensors" else part.pickle_stem
    shards = _with_variant(f"{stem}.{ending}", variant).removesuffix(f".{ending}")
    old = [f"{stem}-*-of-*.{variant}.{ending}"] if variant else []
    names = [_with_variant(f"{stem}.{ending}", variant), f"{shards}-*-of-*.{ending}", *old]
    names += _indexes(stem, ending, variant)
    return [f"{folder}/{name}" if folder else name for name in names]


def variants_named(names: Sequence[str], part: Part) -> set[str]:
    """Return the variants of a component's weights among the names of files."""
    stems = "|".join(re.escape(stem) for stem in {part.stem, part.pickle_stem})
    found = [re.fullmatch(rf"(?:{stems})\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)", name) for name in names]
    return {match[1] for match in found if match}


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map is {shown(table)}; give the file that holds each tensor")
    shards = []
    for name in table.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or not 1 <= len(name) <= 200:
            raise CheckpointError(f"{index}: weight_map names {shown(name)}, which is no file beside it")
        shards.append(index.parent / name)
    shards = sorted(set(shards))
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing, which {index.name} names: the checkpoint is incomplete")
    return shards


def _with_variant(name: str, variant: str | None) -> str:
    head, dot, tail = name.rpartition(".")
    return f"{head}.{variant}{dot}{tail}" if variant else name


def _indexes(stem: str, ending: str, variant: str | None) -> list[str]:
    plain = f"{stem}.{ending}.index.json"
    old = [f"{stem}.{ending}.{variant}.index.json"] if variant else []
    return [_with_variant(plain, variant), *old]


def _variants(folder: Path, part: Part) -> set[str]:
    return variants_named(_names(folder), part)


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []
