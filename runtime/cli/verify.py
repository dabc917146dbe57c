"""`latentrt verify`: a bundle against the checkpoint it came from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...engines.errors import MissingExtraError
from .options import BackendOptions, backend_options, checkpoint_named, opened_bundle
from .progress import progress_bar

if TYPE_CHECKING:
    from ...engines.bundle import Bundle
    from ...export.layers import LayerReport
    from ...export.verify import Report


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    against: Annotated[str, typer.Option("--against", help="The checkpoint: folder, hub id or .safetensors file.")],
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt of the whole request.")] = "a red circle",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the whole request.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the whole request.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id, for a single file.")] = None,
    prediction_type: Annotated[str | None, typer.Option(help="What a single file's U-Net predicts.")] = None,
    vae: Annotated[str | None, typer.Option(help="The VAE that the bundle was exported with: as for export.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the checkpoint's weights.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id with the rest, for a denoiser alone.")] = None,
    any_checkpoint: Annotated[
        bool, typer.Option("--any-checkpoint", help="Compare although the bundle came from another checkpoint.")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="Also compare this graph node by node with ONNX Runtime.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every graph and one whole request with PyTorch on this machine; exit 1 past the bound."""
    opened = opened_bundle(bundle)
    settings = backend_options(backend, options, threads=threads)
    try:
        from ...export.verify import verify as run_verify
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        raise MissingExtraError("cpu,export", "verifying a bundle") from error
    with checkpoint_named(against), progress_bar("verifying") as progress:
        report = run_verify(
            bundle,
            against,
            backend=backend,
            prompt=prompt,
            steps=steps,
            seed=seed,
            tokenizer=tokenizer,
            prediction_type=prediction_type,
            vae=vae,
            variant=variant,
            base=base,
            any_checkpoint=any_checkpoint,
            progress=progress,
            **settings,
        )
    inside = _layers(opened, layers, report.backend) if layers else []
    if as_json:
        typer.echo(json.dumps(report.as_json() | {"layers": [asdict(layer) for layer in inside]}, indent=2))
    else:
        typer.echo("\n".join(_lines(report)))
        worst = sorted(inside, key=lambda layer: (layer.nan_count, layer.relative_error), reverse=True)[:10]
        for layer in sorted(worst, key=inside.index):
            typer.echo(f"  {layer.tensor:<60}{layer.relative_error:>12.2e}{layer.nan_count:>8} not finite")
    if not report.within:
        raise typer.Exit(1)


def _layers(bundle: Bundle, graph: str, backend: str) -> list[LayerReport]:
    from ...export.layers import layer_errors

    return layer_errors(bundle, graph, backend)


def _lines(report: Report) -> list[str]:
    lines = [f"{report.bundle} ({report.precision}) on {report.backend} against PyTorch fp32"]
    lines.append(f"{'output':<28}{'max error':>12}{'relative':>12}{'cosine':>12}{'not finite':>12}{'bound':>10}")
    for t in report.tensors:
        numbers = f"{t.max_abs_error:>12.2e}{t.relative_error:>12.2e}{t.cosine:>12.8f}{t.nan_count:>12}{t.bound:>10.0e}"
        lines.append(f"{t.tensor:<28}{numbers}{'' if t.within else '  past the bound'}")
    if (request := report.request) is not None:
        after = ", ".join(f"{error:.1e}" for error in request.steps)
        lines.append(f"request: latents' relative error after each step: {after}")
        quality = "equal pictures" if request.psnr is None else f"PSNR {request.psnr:.1f} dB"
        lines.append(
            f"request: {quality} (bound {request.bound:g}), SSIM {request.ssim:.5f}, "
            f"max pixel difference {request.max_pixel_difference} of 255{'' if request.within else '  past the bound'}"
        )
    lines.append("within the bounds" if report.within else "past a bound")
    return lines
