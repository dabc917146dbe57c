"""`latentrt generate`: prompts in, PNG files out."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engines.errors import MissingExtraError, RequestError
from ...engines.files import write_atomically
from ..sizes import parse_size
from .options import (
    BackendOptions,
    Forecast,
    GuidanceInterval,
    GuidanceReuse,
    backend_options,
    bytes_of,
    numbers,
    opened_bundle,
)
from .progress import progress_bar

if TYPE_CHECKING:
    from ..arguments import RequestArguments
    from ..result import GenerationResult
    from .pictures import PictureWriter, Target


class SyntaxChoice(str, Enum):
    """Prompt syntaxes that the command line offers."""

    a1111 = "a1111"
    compel = "compel"


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads them from standard input."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Bundle to run (default: the embedded model).")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    negative: Annotated[str, typer.Option("--negative", "-n", help="What the picture should not show.")] = "",
    prompt_syntax: Annotated[
        SyntaxChoice | None,
        typer.Option(
            "--prompt-syntax", help="Read weights and prompts of any length (default: prompts are plain text)."
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option("--seed", "-s", help="Seed of the first picture, or one for each as 7,3 (default: random)."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps (default: the bundle's).")] = None,
    timesteps: Annotated[
        str | None, typer.Option("--timesteps", help="Timesteps to use in place of --steps, such as 999,499.")
    ] = None,
    sigmas: Annotated[
        str | None, typer.Option("--sigmas", help="Sigmas to use in place of --steps, such as 14.6,2.1,0.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="Sampler; `latentrt samplers` lists them.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "-g", help="Guidance scale.")] = None,
    eta: Annotated[float, typer.Option("--eta", help="Noise of the DDIM sampler, 0 to 1.")] = 0.0,
    forecast: Forecast = None,
    guidance_interval: GuidanceInterval = None,
    guidance_reuse: GuidanceReuse = None,
    skip_layers: Annotated[
        str | None,
        typer.Option("--skip-layers", help="Guide away from the network without layers such as 7,8,9."),
    ] = None,
    skip_layer_scale: Annotated[
        float, typer.Option("--skip-layer-scale", help="How far to guide away from that.")
    ] = 2.8,
    skip_layer_interval: Annotated[
        str, typer.Option("--skip-layer-interval", help="The shares of the steps between which to do so.")
    ] = "0.01,0.2",
    decoder: Annotated[
        str, typer.Option("--decoder", help="Decoder: full, or the tiny one that a bundle may have; not exact.")
    ] = "full",
    tiled: Annotated[
        bool | None,
        typer.Option(
            "--tiled/--no-tiled",
            help="Decode a large picture in tiles, in less memory; not exact (default: only where it must be).",
        ),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels.")] = None,
    count: Annotated[int, typer.Option("--count", "-c", help="Pictures per prompt.")] = 1,
    init_image: Annotated[Path | None, typer.Option("--init-image", help="Picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Repaint only the white area of this picture.")] = None,
    padding: Annotated[
        int | None,
        typer.Option("--mask-padding", help="Draw only the mask with so many pixels around it, at the picture size."),
    ] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="How far to leave the initial picture.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png file for one picture, a folder, or - for standard output.")
    ] = Path(),
    grid: Annotated[Path | None, typer.Option("--grid", help="Also write all pictures, labelled, as one PNG.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Hold one stage's engines at a time.")] = False,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="BYTES",
            help="Memory of the device, such as 8GiB, above which fewer picture sizes stay open (default: 3/4 of what "
            "is free on a GPU).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths, seeds and timings as JSON.")] = False,
) -> None:
    """Turn prompts into pictures."""
    texts = read_prompts(prompts, prompt_file)
    width, height = parse_size(size) if size else (None, None)
    from .pictures import Target, check_png

    target = Target.of(output, len(texts) * count)
    if grid is not None:
        check_png("--grid", grid)
    if target.is_stdout and as_json:
        raise RequestError("--output - and --json would both write to standard output: give one of them")
    interval = numbers("--skip-layer-interval", skip_layer_interval, float) or []
    if len(interval) != 2:
        raise RequestError(f"--skip-layer-interval is {skip_layer_interval!r}: give two shares, such as 0.01,0.2")
    request: RequestArguments = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "timesteps": numbers("--timesteps", timesteps, float),
        "sigmas": numbers("--sigmas", sigmas, float),
        "guidance_scale": guidance,
        "num_images_per_prompt": count,
        "prompt_syntax": None if prompt_syntax is None else prompt_syntax.value,
        "seed": _seeds(seed),
        "sampler": sampler,
        "eta": eta,
        "forecast": forecast,
        "guidance_interval": numbers("--guidance-interval", guidance_interval, float),  # type: ignore[typeddict-item]
        "guidance_reuse": guidance_reuse,
        "skip_guidance_layers": numbers("--skip-layers", skip_layers, int),
        "skip_layer_guidance_scale": skip_layer_scale,
        "skip_layer_guidance_start": interval[0],
        "skip_layer_guidance_stop": interval[1],
        "decoder": decoder,  # type: ignore[typeddict-item]
        "tiled": tiled,
        "image": init_image,
        "mask_image": mask,
        "padding_mask_crop": padding,
        "strength": strength,
    }
    budget = bytes_of("--memory-budget", memory_budget)
    settings = {"low_memory": low_memory, "memory_budget": budget, **backend_options(backend, options, threads=threads)}
    drawn = _draw(bundle, backend, settings, (texts, negative), request, target, as_json, keep=grid is not None)
    _finish(drawn, grid, listed=not target.is_stdout, as_json=as_json)


def _seeds(text: str | None) -> int | list[int] | None:
    """Return one seed, or a list of those between commas."""
    seeds = numbers("--seed", text, int)
    return seeds[0] if seeds is not None and "," not in (text or "") else seeds


@dataclass(frozen=True)
class _Drawn:
    result: GenerationResult[Any]
    entries: list[dict[str, Any]]
    described: dict[str, Any]
    open_seconds: float
    write_seconds: float


def _draw(
    bundle: Path | None,
    backend: str,
    settings: dict[str, Any],
    prompts: tuple[list[str], str],
    request: RequestArguments,
    target: Target,
    as_json: bool,
    keep: bool,
) -> _Drawn:
    """Open the pipeline, draw all pictures and write them; what was written before an error is named."""
    from ..pipeline import Pipeline
    from .pictures import PictureWriter

    began = time.perf_counter()
    chosen = opened_bundle(_embedded() if bundle is None else bundle)
    with (
        progress_bar("generating") as progress,
        Pipeline.open(chosen, backend, progress=progress, **settings) as pipe,
    ):
        ready = time.perf_counter()
        described = {
            "bundle": "embedded" if bundle is None else chosen.path.resolve().name,
            "checkpoint": chosen.manifest.source.get("name"),
            "precision": chosen.manifest.precision,
        }
        with PictureWriter(target, described) as writer:
            try:
                heard: RequestArguments = {**request, "on_batch": writer, "keep_images": keep, "progress": progress}
                result = pipe(*prompts, **heard)
            except BaseException:
                if not target.is_stdout:
                    _name_rescued(writer, as_json)
                raise
            drawn = time.perf_counter()
            entries = writer.entries()
            write_seconds = time.perf_counter() - drawn
    return _Drawn(result, entries, described, ready - began, write_seconds)


def _name_rescued(writer: PictureWriter, as_json: bool) -> None:
    rescued = writer.rescued()
    if as_json and rescued:
        typer.echo(json.dumps({"images": rescued}, indent=2))
    elif not as_json:
        _echo(rescued)


def _finish(drawn: _Drawn, grid: Path | None, *, listed: bool, as_json: bool) -> None:
    """Print what was drawn, all of which is written, and then write the grid."""
    if as_json:
        assert drawn.result.request is not None
        report = {
            "images": drawn.entries,
            "timings": {"open": drawn.open_seconds, **asdict(drawn.result.timings), "write": drawn.write_seconds},
            "memory": drawn.result.memory,
            "request": {**drawn.result.request.model_dump(mode="json"), **drawn.described},
            "warnings": drawn.result.warnings,
        }
        typer.echo(json.dumps(report, indent=2))
    elif listed:
        _echo(drawn.entries)
    if grid is not None:
        from ..pictures import png as images

        sheet = images.grid(drawn.result.images, [entry["prompt"] for entry in drawn.entries])
        write_atomically(grid, images.encode_png(sheet))
        if listed and not as_json:
            typer.echo(str(grid))


def _echo(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        typer.echo(f"{entry['path']}  seed {entry['seed']}  {entry['prompt']}")


def _embedded() -> Path:
    """Return the embedded model's bundle."""
    try:
        from ...export.embedded import ensure_bundle
    except ImportError as error:
        raise MissingExtraError("export", "the embedded model") from error
    with progress_bar("exporting the embedded model") as progress:
        return ensure_bundle(progress=progress)


def read_prompts(arguments: list[str] | None, file: Path | None) -> list[str]:
    """Return prompts from the arguments, from standard input for `-`, or one a line from a file."""
    if bool(arguments) == bool(file):
        raise RequestError("give prompts either as arguments (- for standard input) or with --prompts FILE")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise RequestError(f"--prompts {file} does not exist: give a text file with one prompt a line") from error
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"--prompts {file} cannot be read as UTF-8 text: {why}") from error
    elif arguments == ["-"]:
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")  # whatever the console's encoding is
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input cannot be read as UTF-8 text: {error}") from error
    else:
        return list(arguments or [])
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        source = "standard input" if file is None else f"--prompts {file}"
        raise RequestError(f"{source} holds no prompts: write one a line")
    return prompts
