"""`latentrt export`, `quantize` and `verify`: a bundle, and what it came from."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engines.backends import resolve
from ...engines.bundle import Bundle
from ...engines.errors import MissingExtraError, RequestError
from .options import (
    BackendOptions,
    Forecast,
    GuidanceInterval,
    GuidanceReuse,
    backend_options,
    checkpoint_named,
    numbers,
    opened_bundle,
)
from .progress import progress_bar

if TYPE_CHECKING:
    from ...export.layers import LayerReport
    from ...export.verify import Report


class PrecisionChoice(str, Enum):
    """Number format of the networks."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class EightBitsChoice(str, Enum):
    """What quantized layers compute in."""

    int8 = "int8"
    fp8 = "fp8"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A diffusers folder, a hub id (org/name), or a .safetensors file of the original layout."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    precision: Annotated[PrecisionChoice, typer.Option(help="Number format of the networks.")] = PrecisionChoice.fp32,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id, for a single file.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="What a single file's U-Net predicts: epsilon or v_prediction.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="VAE in place of the checkpoint's: folder, .safetensors file or hub id.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weights, such as fp16 or non_ema.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id with the rest, for a single file with a denoiser alone.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a request that names none, for few-step models.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of a request that names none.")] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            "--skip-layers",
            help="Layers that requests may have skipped, where the model has such guidance (default: its own).",
        ),
    ] = None,
    textual_inversion: Annotated[
        list[str] | None,
        typer.Option(
            "--textual-inversion", metavar="[TOKEN=]FILE", help="File with a learned word to add; may be repeated."
        ),
    ] = None,
    tiny_decoder: Annotated[
        str | None,
        typer.Option(help="Tiny autoencoder (TAESD) for `generate --decoder tiny`: diffusers folder or hub id."),
    ] = None,
    hoist: Annotated[
        bool, typer.Option("--hoist", help="Compute what steps have in common once for a request.")
    ] = False,
    winograd: Annotated[
        bool, typer.Option("--winograd", help="Compute large convolutions in half the products, for processors.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs (needs the export extra)."""
    from ...export import export_checkpoint

    _check_revision(revision, base or checkpoint)
    with checkpoint_named(checkpoint), progress_bar("exporting") as progress:
        path = export_checkpoint(
            checkpoint,
            output,
            precision=precision.value,
            revision=revision,
            replace=force,
            tokenizer=tokenizer,
            prediction_type=prediction_type,
            vae=vae,
            variant=variant,
            base=base,
            num_inference_steps=steps,
            guidance_scale=guidance,
            skip_layers=numbers("--skip-layers", skip_layers, int),
            textual_inversion=textual_inversion or (),
            tiny_decoder=tiny_decoder,
            hoist=hoist,
            winograd=winograd,
            progress=progress,
        )
    typer.echo(f"{path}: {readable_size(sum(f.size for f in Bundle.open(path).manifest.files.values()))}")


def quantize(
    bundle: Annotated[Path, typer.Argument(help="A bundle in fp32 or fp16.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    precision: Annotated[EightBitsChoice, typer.Option(help="What most layers of the denoiser compute in.")],
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with two or more prompts, one a line, like those to be drawn."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="LAYER", help="Layers to leave as they are; * is anything; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of a picture (default: the bundle's, up to 20).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first picture.")] = 0,
    tries: Annotated[
        int, typer.Option("--tries", min=0, help="Measurements that look for layers that lose most, at most.")
    ] = 32,
    python: Annotated[
        Path | None,
        typer.Option("--python", help="Python that has nvidia-modelopt (default: an environment that is made once)."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Write a bundle whose denoiser computes in 8 bits, with what that costs in its manifest.

    Pictures that the bundle draws on the processor calibrate NVIDIA's Model Optimizer, which runs in an environment of
    its own; others measure what is lost.
    """
    from ...export.quantize import quantize_bundle
    from .generate import read_prompts

    opened_bundle(bundle)
    prompts = None if prompt_file is None else read_prompts(None, prompt_file)
    with progress_bar("quantizing") as progress:
        path = quantize_bundle(
            bundle,
            output,
            precision=precision.value,
            prompts=prompts,
            keep=keep or (),
            steps=steps,
            seed=seed,
            tries=tries,
            python=python,
            threads=threads,
            replace=force,
            progress=progress,
        )
    done = Bundle.open(path)
    size = readable_size(sum(f.size for f in done.manifest.files.values()))
    typer.echo(f"{path}: {size}, {done.graph('denoiser').quantization}")


def readable_size(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Its checkpoint (folder, hub id or .safetensors file) or another bundle (default: its own exact run).",
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt of the whole request.")] = "a red circle",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the whole request.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the whole request.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    forecast: Forecast = None,
    guidance_interval: GuidanceInterval = None,
    guidance_reuse: GuidanceReuse = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub id, for a single file.")] = None,
    prediction_type: Annotated[str | None, typer.Option(help="What a single file's U-Net predicts.")] = None,
    vae: Annotated[str | None, typer.Option(help="The VAE that the bundle was exported with: as for export.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the checkpoint's weights.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id with the rest, for a denoiser alone.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id (default: what the bundle was exported from).")
    ] = None,
    tiny_decoder: Annotated[
        str | None, typer.Option(help="The tiny autoencoder that the bundle was exported with: as for export.")
    ] = None,
    any_checkpoint: Annotated[
        bool, typer.Option("--any-checkpoint", help="Compare although the bundle came from another checkpoint.")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="Also compare this graph node by node with ONNX Runtime.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every graph and one whole request with the exact run, or with PyTorch; exit 1 past the bound."""
    opened = opened_bundle(bundle)
    settings = backend_options(backend, options, threads=threads) | {"backend": backend}
    if layers and options:
        raise RequestError("--layers runs the backend without options: leave out --layers, or --option")
    inside: list[LayerReport] = []
    if layers:
        from ...export.layers import layer_errors

        inside = layer_errors(opened, layers, resolve(backend), threads)
    request: dict[str, Any] = {"prompt": prompt, "steps": steps, "seed": seed}
    lossy: dict[str, Any] = {
        "forecast": forecast,
        "guidance_interval": numbers("--guidance-interval", guidance_interval, float),
        "guidance_reuse": guidance_reuse,
    }
    lossy = {name: value for name, value in lossy.items() if value is not None}
    checkpoint: dict[str, Any] = {"tokenizer": tokenizer, "prediction_type": prediction_type, "vae": vae}
    checkpoint |= {"variant": variant, "base": base, "revision": revision, "tiny_decoder": tiny_decoder}
    checkpoint |= {"any_checkpoint": any_checkpoint}
    if against is None or (Path(against) / "manifest.json").is_file():
        if given := next((name for name, value in checkpoint.items() if value), None):
            raise RequestError(f"--{given.replace('_', '-')} is about a checkpoint: give the checkpoint with --against")
        from ...benchmarks.quality.drift import drift

        with progress_bar("verifying") as progress:
            report = drift(bundle, exact=against, lossy=lossy, progress=progress, **request, **settings)
    else:
        if lossy:
            name = next(iter(lossy)).replace("_", "-")
            raise RequestError(f"--{name} is compared with an exact run: leave out --against, or give a bundle")
        _check_revision(revision, base or against)
        report = _verified(bundle, against, request | checkpoint | settings)
    if as_json:
        typer.echo(json.dumps(report.as_json() | {"layers": [asdict(layer) for layer in inside]}, indent=2))
    else:
        typer.echo("\n".join(_verdict(report)))
        worst = sorted(inside, key=lambda layer: (layer.nan_count, layer.relative_error), reverse=True)[:10]
        for layer in sorted(worst, key=inside.index):
            typer.echo(f"  {layer.tensor:<60}{layer.relative_error:>12.2e}{layer.nan_count:>8} not finite")
    if not report.within:
        raise typer.Exit(1)


def _check_revision(revision: str | None, source: str) -> None:
    if revision is not None and Path(source).exists():
        raise RequestError(f"--revision is for hub ids, and {source} is a local path: leave it out")


def _verified(bundle: Path, checkpoint: str, arguments: dict[str, Any]) -> Report:
    try:
        from ...export.verify import verify as run_verify
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        raise MissingExtraError("cpu,export", "verifying a bundle") from error
    with checkpoint_named(checkpoint), progress_bar("verifying") as progress:
        return run_verify(bundle, checkpoint, progress=progress, **arguments)


def _verdict(report: Report) -> list[str]:
    told = "".join(f", {name}={value}" for name, value in report.options.items())
    lines = [f"{report.bundle} ({report.precision}) on {report.backend}{told} against {report.against}"]
    lines.append(f"{'output':<28}{'max error':>12}{'relative':>12}{'cosine':>12}{'not finite':>12}{'bound':>10}")
    for t in report.tensors:
        numbers = f"{t.max_abs_error:>12.2e}{t.relative_error:>12.2e}{t.cosine:>12.8f}{t.nan_count:>12}{t.bound:>10.0e}"
        lines.append(f"{t.tensor:<28}{numbers}{'' if t.within else '  past the bound'}")
    lines += [f"{name} is not compared: {why}" for name, why in report.left_out.items()]
    if (request := report.request) is not None:
        after, when = ", ".join(f"{error:.1e}" for error in request.steps), "each" if request.steps[1:] else "the last"
        lines.append(f"request: latents' relative error after {when} step: {after}")
        quality = "equal pictures" if request.psnr is None else f"PSNR {request.psnr:.1f} dB"
        bound = "" if request.bound is None else f" (bound {request.bound:g})"
        lines.append(
            f"request: {quality}{bound}, SSIM {request.ssim:.5f}, HaarPSI {request.haarpsi:.5f}, "
            f"max pixel difference {request.max_pixel_difference} of 255{'' if request.within else '  past the bound'}"
        )
    lines.append("within the bounds" if report.within else "past a bound")
    return lines
