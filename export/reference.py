"""Checkpoints as diffusers itself opens them: what `verify` compares with, so that both sides do not read alike."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..engines.errors import CheckpointError
from .checkpoints.checkpoint import Checkpoint, Component, Origin
from .checkpoints.configs import said_by

PLAIN: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
BESIDE: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def reference_pipeline(checkpoint: Checkpoint, class_name: str, beside: Mapping[str, Any] = BESIDE) -> Any:
    """Return diffusers' pipeline of a checkpoint, in float32, opened by diffusers' own loaders.

    A folder is opened by `from_pretrained`, a single file by `from_single_file`, a VAE that takes the place of the
    checkpoint's own in the same way. The scheduler is what the checkpoint's own pipeline class leaves of it. Raises
    `CheckpointError` when diffusers cannot open it.
    """
    import diffusers

    open_it = _folder if checkpoint.path.is_dir() else _file
    try:
        beside = dict(beside) | {name: _replaced(origin) for name, origin in checkpoint.replaced.items()}
        pipeline = open_it(getattr(diffusers, class_name), checkpoint, beside)
        if checkpoint.pipeline != class_name:
            again = beside | {name: getattr(pipeline, name) for name in (*checkpoint.components, "tokenizer")}
            pipeline.scheduler = open_it(getattr(diffusers, checkpoint.pipeline), checkpoint, again).scheduler
    except Exception as error:  # diffusers and transformers raise many kinds
        raise CheckpointError(
            f"diffusers cannot open {checkpoint.name}, so there is nothing to compare with ({said_by(error)})"
        ) from error
    return pipeline


def opened_by(pipeline: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the networks of a pipeline that diffusers has opened in place of its own.

    diffusers opens the autoencoder of a tiny decoder too.
    """
    components = {
        name: _Held(each.part, each.where, each.config, each.weights, each.find, getattr(pipeline, name))
        for name, each in checkpoint.components.items()
    }
    tiny = checkpoint.tiny_decoder
    if tiny is not None:
        own = tiny.component
        held = _Held(own.part, own.where, own.config, own.weights, own.find, _replaced(tiny))
        tiny = replace(tiny, component=held)
    return replace(checkpoint, components=components, tiny_decoder=tiny)


@dataclass(frozen=True)
class _Held(Component):
    """A component whose network is there already."""

    module: Any

    def load(self) -> torch.nn.Module:
        """Return the network with the same weights and a structure of its own, which graphs may take apart."""
        shared = {id(tensor): tensor for tensor in chain(self.module.parameters(), self.module.buffers())}
        module: torch.nn.Module = copy.deepcopy(self.module, shared)
        return module.eval().requires_grad_(False)


def _folder(pipeline: Any, checkpoint: Checkpoint, beside: Mapping[str, Any]) -> Any:
    return pipeline.from_pretrained(str(checkpoint.path), variant=checkpoint.variant, **PLAIN, **beside)


def _file(pipeline: Any, checkpoint: Checkpoint, beside: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizerFast

    tokenizers = {}
    for name, source in checkpoint.tokenizers.items():
        tokenizer = CLIPTokenizerFast.from_pretrained(str(source.folder), local_files_only=True)
        if source.pad_id is not None:
            pad = tokenizer.convert_ids_to_tokens(source.pad_id)
            tokenizer = CLIPTokenizerFast.from_pretrained(str(source.folder), local_files_only=True, pad_token=pad)
        tokenizers[name] = tokenizer
    with TemporaryDirectory() as folder:
        _write_configs(Path(folder), checkpoint)
        return pipeline.from_single_file(str(checkpoint.path), config=folder, **tokenizers, **PLAIN, **beside)


def _write_configs(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the configs that diffusers needs beside a single file, which it would fetch from the hub otherwise."""
    index: dict[str, Any] = {"_class_name": checkpoint.pipeline, **checkpoint.options}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in checkpoint.tokenizers}
    for name, component in checkpoint.components.items():
        index[name] = [component.part.library, component.part.class_name]
        config = {key: value for key, value in component.config.items() if value is not None}
        if component.part.library == "transformers":
            config |= {"model_type": "clip_text_model", "num_hidden_layers": _text_layers(name, component)}
        _write(folder / name / "config.json", config)
    index["scheduler"] = ["diffusers", checkpoint.scheduler["_class_name"]]
    _write(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    _write(folder / "model_index.json", index)


def _text_layers(component: str, encoder: Component) -> int:
    """Return how many layers diffusers converts, counted with its own list of what it leaves out of OpenCLIP.

    Of the two encoders of Stable Diffusion XL the second has the larger number, also when it is alone.
    """
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE as LEFT_OUT

    found = [re.match(r"conditioner\.embedders\.\d\.", name) for name in encoder.weights]
    prefixes = {match[0] for match in found if match} or {"cond_stage_model."}
    prefix = {"text_encoder": min, "text_encoder_2": max}[component](prefixes)
    names = [name for name in encoder.weights if name.startswith(prefix) and name not in LEFT_OUT]
    layers = [re.search(r"\.(?:resblocks|encoder\.layers)\.(\d+)\.", name) for name in names]
    return 1 + max(int(match[1]) for match in layers if match)


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")


def _replaced(origin: Origin) -> Any:
    """Return a network from somewhere else, opened by diffusers."""
    kind = origin.component.part.configured()
    if origin.path.is_dir():
        variants = {file.name.split(".")[1] for file in origin.files.values() if file.name.count(".") > 1}
        variant = next((found.split("-")[0] for found in variants if found != "safetensors"), None)
        return kind.from_pretrained(str(origin.path), variant=variant, **PLAIN)
    with TemporaryDirectory() as folder:
        _write(Path(folder) / "config.json", {k: v for k, v in origin.component.config.items() if v is not None})
        return kind.from_single_file(str(origin.path), config=folder, **PLAIN)
