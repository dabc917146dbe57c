"""Checkpoints in the diffusers layout: a folder with `model_index.json` and one subfolder per component."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..families import Family, families, family_of_pipeline
from .checkpoint import Checkpoint, Component, Origin, Part, TokenizerSource
from .configs import shown
from .defaults import NAMES, fits
from .json_files import read_json
from .tokenizer import TokenizerKind
from .weight_files import check_variant, variants_of, weight_files
from .weights import Weights

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What the config of a VAE says of the latents' size."""


def open_folder(
    folder: Path,
    name: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    replaced: Mapping[str, Origin] | None = None,
) -> Checkpoint:
    """Open a diffusers folder; `name` and `revision` are what the bundle will say about its source.

    `variant` is read where a component has it, plain weights elsewhere; `replaced` are components from somewhere else,
    which the folder need not have. Raises `CheckpointError` for missing or damaged parts, `UnsupportedModelError` for
    another kind of pipeline.
    """
    check_variant(variant)
    index = read_json(folder / "model_index.json")
    family = family_of_index(folder, index)
    replaced = replaced or {}
    parts = {name: part for name, part in family.parts.items() if has_component(index, family, name)}
    tokenizers = [name for name in family.tokenizers if has_component(index, family, name)]
    own = {component: part for component, part in parts.items() if component not in replaced}
    for component, part in own.items():
        _check_declared(folder, component, part, index)
    for component, origin in replaced.items():
        if origin.component.part.class_name != family.parts[component].class_name:
            raise UnsupportedModelError(
                f"{origin.component.where} is {origin.component.part.class_name}, where {family.title} has "
                f"{family.parts[component].class_name}"
            )
    configs = {component: read_json(folder / component / "config.json") for component in own}
    chosen = variants_of(folder, own, variant)
    components = {component: origin.component for component, origin in replaced.items()}
    files = {name: file for origin in replaced.values() for name, file in origin.files.items()}
    for component, part in own.items():
        weights = Weights(weight_files(folder / component, part, chosen[component]))
        files.update({file.relative_to(folder).as_posix(): file for file in weights.files})
        components[component] = Component.of(part, f"{folder / component}", configs[component], weights)
    for tokenizer in tokenizers:
        _check_tokenizer(folder, tokenizer, family.tokenizers[tokenizer], index)
    return Checkpoint(
        name,
        family.name,
        index["_class_name"],
        {component: components[component] for component in parts},
        tokenizers={tokenizer: TokenizerSource(folder / tokenizer) for tokenizer in tokenizers},
        scheduler=_scheduler(folder, index),
        files=files,
        path=folder,
        revision=revision,
        variant=variant,
        replaced=replaced,
        vae_scale=_vae_scale(folder) if "vae" in replaced else {},
        options={key: value for key, value in index.items() if isinstance(value, bool | int | float | str)},
        defaults=_defaults(folder, index),
    )


def family_of_index(folder: Path, index: Mapping[str, Any]) -> Family:
    """Return the family that a folder's `model_index.json` names, or raise `UnsupportedModelError`."""
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list):
        raise UnsupportedModelError(f"{folder}: {shown(pipeline)} is a pipeline with code of its own, which is not run")
    family = family_of_pipeline(pipeline) if isinstance(pipeline, str) else None
    if family is None:
        known = ", ".join(name for family in families() for name in family.pipelines)
        raise UnsupportedModelError(f"{folder}: pipeline {shown(pipeline)} is not supported, only {known}")
    return family


def _declared(index: Mapping[str, Any], component: str) -> tuple[Any, Any]:
    """Return a component's library and class in the index; both are None for one that is null or missing."""
    declared = index.get(component)
    if isinstance(declared, list) and len(declared) == 2:
        return declared[0], declared[1]
    return (None, None) if declared is None else (declared, declared)


def has_component(index: Mapping[str, Any], family: Family, component: str) -> bool:
    """Tell whether a checkpoint should have a component: all but those that its family may lack, and its index does."""
    return component not in family.optional or _declared(index, component) != (None, None)


def _check_declared(folder: Path, component: str, part: Part, index: Mapping[str, Any]) -> None:
    library, class_name = _declared(index, component)
    if class_name is None or library is None:
        raise UnsupportedModelError(
            f"{folder}: component {component} is null in model_index.json: give a checkpoint that has one"
            + (", or --vae" if component == "vae" else "")
        )
    if class_name != part.class_name:
        raise UnsupportedModelError(
            f"{folder}: component {component} is {shown(class_name)}; only {part.class_name} is supported here"
        )
    if library != part.library:
        raise UnsupportedModelError(
            f"{folder}: component {component} is a class of {shown(library)}, where {part.library}'s is supported: "
            "code that comes with a checkpoint is not run"
        )


def _check_tokenizer(folder: Path, tokenizer: str, kind: TokenizerKind, index: Mapping[str, Any]) -> None:
    _, class_name = _declared(index, tokenizer)
    if class_name not in kind.classes:
        raise UnsupportedModelError(
            f"{folder}: {tokenizer} is {shown(class_name)}; only {kind.classes[0]} is supported here"
        )
    if not any((folder / tokenizer / file).is_file() for file in TOKENIZER_FILES):
        names = " or ".join(TOKENIZER_FILES)
        raise CheckpointError(f"{folder / tokenizer} has no {names}: the checkpoint is incomplete")


def _scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler config under the class that the index names: diffusers builds that one from it."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    dropped = config.pop("_use_default_values", [])  # keys that diffusers leaves to the class's defaults
    for key in dropped if isinstance(dropped, list) else []:
        if isinstance(key, str):
            config.pop(key, None)
    library, class_name = _declared(index, "scheduler")
    if class_name is None or library != "diffusers":
        raise UnsupportedModelError(
            f"{folder}: scheduler is {shown(index.get('scheduler'))} in model_index.json: name a class of diffusers"
        )
    if not isinstance(class_name, str):
        raise CheckpointError(f"{folder}: scheduler is {shown(class_name)} in model_index.json: name a class")
    return config | {"_class_name": class_name}


def _vae_scale(folder: Path) -> dict[str, Any]:
    """Return what a folder's own VAE, whose config it need not have, says of the latents' size."""
    file = folder / "vae" / "config.json"
    config = read_json(file) if file.is_file() else {}
    return {key: config[key] for key in SCALE if key in config}


def _defaults(folder: Path, index: dict[str, Any]) -> dict[str, float]:
    """Return the table `_latentrt` of the index, a key that diffusers ignores, after checking it."""
    table = index.get("_latentrt", {})
    if not isinstance(table, dict) or not all(key in NAMES and fits(key, value) for key, value in table.items()):
        raise CheckpointError(
            f"{folder / 'model_index.json'}: _latentrt is {shown(table)}; give numbers for {' and '.join(NAMES)}"
        )
    return table
