"""Checkpoints whose JSON files somebody has changed, by chance or on purpose."""

from __future__ import annotations

import copy
import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

from latentrt.engines.bundle import Manifest
from latentrt.engines.errors import LatentRTError
from latentrt.export.checkpoints.sources import open_checkpoint
from latentrt.export.checkpoints.tokenizer import write_tokenizer
from latentrt.export.embedded import BUNDLE
from latentrt.export.families import family_named
from safetensors.torch import load_file, save_file

INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
FILES = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    INDEX,
]
ODD: list[Any] = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**400, -0.5, 1e308, float("inf"), float("nan")]
ODD += ["", ".", "..", "../x", "/etc/passwd", "a\nb", "\0", "\ud83d", "x" * 5000, [], {}, [[]], {"": {}}, [None, None]]
ODD += ["epsilon", "UNet2DConditionModel", "AutoencoderTiny", "DDIMScheduler", "transformers", ["my", "Code"]]
ODD += [[32, 64], [32] * 40, [10**9], ["DownBlock2D"], ["NoBlock"], {"quant_method": "bitsandbytes"}]
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 50 + b"1" + b"}" * 50, b'{"a": 1e999}']
NEW_KEYS = ["None", "", "_class_name", "_diffusers_version", "quantization_config", "text_config", "shift_factor"]
MANIFEST: dict[str, Any] = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


def make_folder(source: Path, folder: Path) -> dict[str, Any]:
    """Copy a tiny checkpoint, its U-Net in two shards, and return its JSON files by name."""
    shutil.copytree(source, folder)
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors, table = load_file(whole), {}
    for n, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / "unet" / shard)
        table |= dict.fromkeys(names, shard)
    whole.unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES}


def mutated(data: dict[str, dict[str, Any]], seed: int) -> tuple[str, bytes]:
    """Return one of the files, and its new bytes."""
    draw = random.Random(seed)
    name = draw.choice(FILES)
    if draw.random() < 0.05:
        return name, draw.choice(TEXTS)
    changed = copy.deepcopy(data[name])
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        _change(changed, draw)
    return name, json.dumps(changed).encode()


def _change(data: Any, draw: random.Random) -> None:
    places = _places(data)
    if not places:
        return
    holder, key = draw.choice(places)
    way = draw.random()
    if way < 0.65:
        holder[key] = _value(draw)
    elif way < 0.8:
        del holder[key]
    elif isinstance(holder, list):
        holder += [holder[key]] * draw.choice([1, 30])
    else:
        holder[draw.choice(NEW_KEYS)] = _value(draw)


def _value(draw: random.Random) -> Any:
    way = draw.random()
    if way < 0.75:
        return copy.deepcopy(draw.choice(ODD))
    if way < 0.85:
        return draw.choice([draw.randint(-10, 3000), draw.uniform(-2, 2)])
    if way < 0.95:
        return "".join(draw.choices(string.printable, k=draw.randint(1, 12)))
    deep: Any = 1
    for _ in range(draw.choice([3, 60])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return deep


def _places(data: Any) -> list[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, inner in items for place in [(data, key), *_places(inner)]]


def use(folder: Path, name: str, text: bytes, scratch: Path) -> str:
    """Open, check and describe a checkpoint with this file in it; return what was said, empty when it was taken.

    The network whose config has changed is built. What is raised must be of ours, and one line.
    """
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(text)
    try:
        checkpoint = open_checkpoint(folder)
        family = family_named(checkpoint.family)
        family.check(checkpoint)
        ((length, vocabulary),) = family.token_lengths(checkpoint).values()
        latent = family.latent(checkpoint)
        described = {"scheduler": family.scheduler(checkpoint), "latent": latent.model_dump(), **checkpoint.defaults}
        Manifest.model_validate(MANIFEST | described).model_dump_json()
        part = name.split("/")[0]
        if part == "tokenizer":
            info = write_tokenizer(folder / part, scratch / "tokenizer.json", max_length=length, vocab_size=vocabulary)
            assert info.max_length <= length
        elif part in checkpoint.components:
            checkpoint.load(part)
    except LatentRTError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 1500, said
        return said
    finally:
        (folder / name).write_bytes(before)
    return ""
