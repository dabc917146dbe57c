"""A bundle's denoiser in 8 bits: calibrated on pictures that the bundle itself draws, and measured against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ...engines.bundle import EightBits
from ...engines.errors import MissingExtraError, RequestError
from ...engines.progress import Progress, silent


def quantize_bundle(
    bundle: str | Path,
    out: str | Path,
    *,
    precision: EightBits,
    prompts: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    tries: int = 32,
    python: str | Path | None = None,
    threads: int | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a bundle with the convolutions and matrix products of the denoiser in 8 bits and return its folder.

    NVIDIA's Model Optimizer chooses the scales, in an environment of its own: `python` is the interpreter of one that
    has it, otherwise it is made in the folder for caches once. It is calibrated on what the denoiser is called with
    while the bundle draws `prompts` (2 or more, default: a set of many subjects) in `steps` steps (default: the
    bundle's, up to 20) from `seed` on, on the CPU. Of every four prompts the last takes no part and measures what is
    lost, which the manifest says. The first and the last layers stay as they are, as do those that up to `tries`
    measurements find to cost most (0: none are looked for), and those whose names match a pattern of `keep`. Nothing
    is left behind when an error is raised: `RequestError`, `BundleError`, `ExportError`, `EngineError`, `StorageError`
    or `MissingExtraError`.
    """
    if precision not in get_args(EightBits):
        raise RequestError(f"precision is {precision!r}: choose {' or '.join(get_args(EightBits))}")
    try:
        from .work import quantize
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        raise MissingExtraError("cpu,export", "quantizing a bundle") from error
    return quantize(
        bundle,
        Path(out),
        precision,
        prompts=prompts,
        keep=keep,
        steps=steps,
        seed=seed,
        tries=tries,
        python=python,
        threads=threads,
        replace=replace,
        progress=progress,
    )
