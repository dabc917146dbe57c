"""Export: checkpoint to bundle; the only place with PyTorch, diffusers and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engines.bundle import Precision
from ..engines.errors import MissingExtraError
from ..engines.progress import Progress, silent

__all__ = ["export_checkpoint"]


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    precision: Precision = "fp32",
    revision: str | None = None,
    replace: bool = False,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    base: str | Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    skip_layers: Sequence[int] | None = None,
    textual_inversion: Sequence[str | Path] = (),
    tiny_decoder: str | Path | None = None,
    hoist: bool = False,
    winograd: bool = False,
    progress: Progress = silent,
) -> Path:
    """Turn a checkpoint into a bundle and return the bundle's folder.

    `source` is a diffusers folder, a hub id (`revision` picks a branch, tag or commit), or a `.safetensors` file of an
    original layout. Such a file holds no tokenizer and may not say what its U-Net predicts: `tokenizer` names a folder
    or hub id that has one, and `prediction_type` is `epsilon` or `v_prediction`. For a file with nothing but a denoiser
    `base` is the diffusers folder or hub id that all the rest comes from. `vae` names
    a VAE to use, instead of the checkpoint's own where it has one: a folder, a file or a hub id. `variant` picks the
    weights of a folder or hub id that have this word in their names, such as `fp16`, where a component has such.
    `num_inference_steps` and `guidance_scale` become the bundle's defaults, for checkpoints made for few steps.
    `skip_layers` are the layers of a Stable Diffusion 3 that requests may have skipped (default: 7, 8 and 9 of 3.5
    medium; of others none; `()` for none).
    `textual_inversion` are files with learned words, as `FILE` or `TOKEN=FILE`, that prompts may then use.
    `tiny_decoder` is a folder or hub id of diffusers' `AutoencoderTiny`, which requests may then ask for. With `hoist`
    what the denoiser computes from the prompt or the timesteps alone runs once for a request, not in every step. With
    `winograd`, which is for processors and fp32, large convolutions are computed in half the products, to 1e-5. Safety
    checker and feature extractor are not part of a bundle. Nothing is left behind when an error is raised:
    `CheckpointError`, `UnsupportedModelError`, `ExportError`, `StorageError`, `RequestError` or `MissingExtraError`.
    """
    try:
        from .exporter import export
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        extra = "cpu" if error.name == "onnxruntime" else "export"  # exported graphs are checked on the CPU
        raise MissingExtraError(extra, "exporting a checkpoint") from error
    return export(
        source,
        Path(out),
        precision=precision,
        revision=revision,
        replace_bundle=replace,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        vae=vae,
        variant=variant,
        base=base,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        skip_layers=skip_layers,
        textual_inversion=textual_inversion,
        tiny_decoder=tiny_decoder,
        hoist=hoist,
        winograd=winograd,
        progress=progress,
    )
