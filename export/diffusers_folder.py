"""Checkpoints in the diffusers layout: a folder with `model_index.json` and one subfolder per component."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engines.errors import CheckpointError, UnsupportedModelError
from .checkpoint import Checkpoint, Component
from .weights import PICKLE_REASON, PICKLES, Weights

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
WEIGHTS = {  # component: (its class, the stem of its weight files)
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
DEFAULTS = ("default_guidance_scale", "default_num_inference_steps")
VARIANTS = ("", ".fp16")
"""Weight files by preference: full precision, else the half-precision variant."""


def open_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """Open a diffusers folder; `name` and `revision` are what the bundle will say about its source.

    Raises `CheckpointError` for missing or damaged parts, `UnsupportedModelError` for another kind of pipeline.
    """
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UnsupportedModelError(f"{folder}: pipeline {pipeline!r} is not supported, only {', '.join(PIPELINES)}")
    parts: dict[str, Any] = {}
    files = {}
    for part, (expected, _) in WEIGHTS.items():
        declared = (index.get(part) or [None, None])[-1]
        if declared != expected:
            raise UnsupportedModelError(
                f"{folder}: component {part} is {declared!r}; only {expected} is supported here"
            )
        config = read_json(folder / part / "config.json")
        weights = Weights(weight_files(folder, part))
        files.update({file.relative_to(folder).as_posix(): file for file in weights.files})
        parts[part] = Component.of(part, f"{folder / part}", config, weights)
    tokenizer = folder / "tokenizer"
    if not any((tokenizer / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(f"{tokenizer} has no {' or '.join(TOKENIZER_FILES)}: the checkpoint is incomplete")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(
        name,
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        files=files,
        revision=revision,
        defaults=_defaults(folder, index),
    )


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


def weight_files(folder: Path, part: str) -> list[Path]:
    """Return the safetensors files of a component, its shards when it is split.

    Raises `CheckpointError` when there are none, saying so when there are only pickles.
    """
    stem = WEIGHTS[part][1]
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
