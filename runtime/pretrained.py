"""`Pipeline.from_pretrained`: what diffusers' callers pass to it, and a checkpoint's bundle."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..engines.bundle import MANIFEST, Bundle
from ..engines.errors import MissingExtraError, RequestError
from ..engines.progress import Progress, silent, terminal_bar
from .request import short

NUMBERS = ("num_inference_steps", "guidance_scale")
EXPORT_OPTIONS = ("revision", "variant", "vae", "tokenizer", "prediction_type", "base", "tiny_decoder", *NUMBERS)
"""Keywords of the export of a checkpoint."""

IDLE = {
    "safety_checker": (None,),
    "requires_safety_checker": (True, False),
    "feature_extractor": (None,),
    "image_encoder": (None,),
    "use_safetensors": (None, True, False),
    "low_cpu_mem_usage": (None, True, False),
    "local_files_only": (None, False),
    "force_download": (None, False),
    "device_map": (None,),
    "custom_pipeline": (None,),
    "token": (None,),
    "cache_dir": (None,),
}
"""Keywords of diffusers that change nothing here, with the values for which that is so."""

INSTEAD = {
    "safety_checker": "bundles hold none, and pictures are not checked: leave it out, and check result.images yourself",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "device_map": "choose with backend=",
    "token": "set HF_TOKEN",
    "cache_dir": "set HF_HOME for checkpoints, LATENTRT_HOME for bundles and engines",
}

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "auto": "auto", "None": "fp32"}


def bundle_of(source: str | Path, named: Mapping[str, Any], progress: Progress) -> tuple[Bundle, dict[str, Any]]:
    """Return the bundle of a checkpoint or of a bundle's folder, and the keywords that are left for `Pipeline.open`.

    A checkpoint's is exported into the cache at first use, with a bar in a terminal unless `progress` is given.
    Raises `RequestError` for keywords of diffusers that cannot be served, `MissingExtraError` without the extra.
    """
    if not isinstance(source, str | os.PathLike):
        raise RequestError(f"source is {short(source)}: give a folder, a file or a hub id")
    left = dict(named)
    for name in [name for name in left if name in IDLE]:
        value = left.pop(name)
        if not any(value is idle for idle in IDLE[name]):
            raise RequestError(
                f"{name} is not supported: {INSTEAD.get(name, 'a bundle holds its graphs only, leave it out')}"
            )
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "controlnet"):
        if name in left:
            raise RequestError(f"{name} cannot be given: a bundle is made of files; save a checkpoint with it")
    precision = left.pop("precision", None) or _precision(left)
    options = {name: value for name in EXPORT_OPTIONS if (value := left.pop(name, None)) is not None}
    for name, value in options.items():
        if not isinstance(value, int | float if name in NUMBERS else str | Path):
            if name in NUMBERS:
                raise RequestError(f"{name} is a {type(value).__name__}: give a number")
            raise RequestError(f"{name} is a {type(value).__name__}: give a name, a folder or a hub id")
    if (Path(source) / MANIFEST).is_file():
        return _own(Bundle.open(source), precision, options), left
    try:
        # the one way up from this layer: a name, so that nothing of the export is loaded, or needed, for bundles
        cached = importlib.import_module("...export.cached", __name__)
    except ImportError as error:
        raise MissingExtraError("export", "opening a checkpoint") from error
    shown = progress is silent and sys.stderr.isatty()
    with terminal_bar("exporting") if shown else nullcontext(progress) as update:
        path = cached.cached_bundle(source, precision=precision or "fp32", progress=update, **options)
    return Bundle.open(path), left


def _precision(left: dict[str, Any]) -> str | None:
    """Take torch_dtype or dtype out of the keywords and return the precision that it means, None without one."""
    given = [left.pop(name) for name in ("torch_dtype", "dtype") if name in left]
    if not given or given[0] is None:
        return None
    name = getattr(given[0], "__name__", str(given[0])).removeprefix("torch.")
    if name not in PRECISIONS:
        raise RequestError(f"torch_dtype is {name}: a bundle is float32, float16 or bfloat16")
    return PRECISIONS[name]


def _own(bundle: Bundle, precision: str | None, options: Mapping[str, Any]) -> Bundle:
    """Return a bundle, for which nothing can be chosen any more; raises `RequestError` where something else was."""
    if precision not in (None, "auto", bundle.manifest.precision):
        raise RequestError(f"bundle {bundle.path} is {bundle.manifest.precision}: export the checkpoint in {precision}")
    if options:
        raise RequestError(f"{next(iter(options))} is for checkpoints, and {bundle.path} is a bundle: leave it out")
    return bundle
