"""Checkpoints in the diffusers layout: a folder with `model_index.json` and one subfolder per component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..families import Family, families, family_of_pipeline
from .checkpoint import Checkpoint, Component, TokenizerSource
from .weights import PICKLE_REASON, PICKLES, Weights

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
DEFAULTS = ("default_guidance_scale", "default_num_inference_steps")
VARIANTS = ("", ".fp16")
"""Weight files by preference: full precision, else the half-precision variant."""


def open_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """Open a diffusers folder; `name` and `revision` are what the bundle will say about its source.

    Raises `CheckpointError` for missing or damaged parts, `UnsupportedModelError` for another kind of pipeline.
    """
    index = read_json(folder / "model_index.json")
    family = family_of_index(folder, index)
    components = {}
    files = {}
    for component, part in family.parts.items():
        declared = (index.get(component) or [None, None])[-1]
        if declared != part.class_name:
            raise UnsupportedModelError(
                f"{folder}: component {component} is {declared!r}; only {part.class_name} is supported here"
            )
        config = read_json(folder / component / "config.json")
        weights = Weights(weight_files(folder, component, part.stem))
        files.update({file.relative_to(folder).as_posix(): file for file in weights.files})
        components[component] = Component.of(part, f"{folder / component}", config, weights)
    for tokenizer in family.tokenizers:
        if not any((folder / tokenizer / file).is_file() for file in TOKENIZER_FILES):
            names = " or ".join(TOKENIZER_FILES)
            raise CheckpointError(f"{folder / tokenizer} has no {names}: the checkpoint is incomplete")
    return Checkpoint(
        name,
        family.name,
        index["_class_name"],
        components,
        tokenizers={tokenizer: TokenizerSource(folder / tokenizer) for tokenizer in family.tokenizers},
        scheduler=_scheduler(folder, index),
        files=files,
        revision=revision,
        defaults=_defaults(folder, index),
    )


def _scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler config under the class that the index names: diffusers builds that one from it."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    declared = index.get("scheduler")
    if isinstance(declared, list) and len(declared) == 2 and isinstance(declared[1], str):
        config["_class_name"] = declared[1]
    return config


def family_of_index(folder: Path, index: Mapping[str, Any]) -> Family:
    """Return the family that a folder's `model_index.json` names, or raise `UnsupportedModelError`."""
    pipeline = index.get("_class_name")
    family = family_of_pipeline(pipeline)
    if family is None:
        known = ", ".join(name for family in families() for name in family.pipelines)
        raise UnsupportedModelError(f"{folder}: pipeline {pipeline!r} is not supported, only {known}")
    return family


def _defaults(folder: Path, index: dict[str, Any]) -> dict[str, float]:
    """Return the table `_latentrt` of the index, a key that diffusers ignores, after checking it."""
    table = index.get("_latentrt", {})
    if not isinstance(table, dict) or not all(
        key in DEFAULTS and isinstance(value, int | float) and value >= 0 for key, value in table.items()
    ):
        raise CheckpointError(
            f"{folder / 'model_index.json'}: _latentrt is {table!r}; give numbers for {' and '.join(DEFAULTS)}"
        )
    return table


def weight_files(folder: Path, part: str, stem: str) -> list[Path]:
    """Return the safetensors files of a component, its shards when it is split.

    Raises `CheckpointError` when there are none, saying so when there are only pickles.
    """
    for variant in VARIANTS:
        single = folder / part / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
            if (folder / part / index).is_file():
                table = read_json(folder / part / index).get("weight_map") or {}
                return [folder / part / Path(shard).name for shard in sorted(set(table.values()))]
    if any(file.suffix in PICKLES for file in (folder / part).glob("*")):
        raise CheckpointError(f"{folder / part} has no .safetensors weights, only a pickle: {PICKLE_REASON}")
    raise CheckpointError(f"{folder / part} has no {stem}.safetensors: the checkpoint is incomplete")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises `CheckpointError` when it is missing or damaged."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: give a complete diffusers checkpoint folder")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return data
