"""`latentrt generate`: prompts in, PNG files out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.errors import MissingExtraError, RequestError
from ...engines.files import write_atomically
from ..sizes import parse_size
from .options import BackendOptions, backend_options
from .progress import progress_bar


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads them from standard input."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Bundle to run (default: embedded model).")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    negative: Annotated[str, typer.Option("--negative", "-n", help="What the picture should not show.")] = "",
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="Seed of the first picture (default: random).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps (default: the bundle's).")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="Sampler, such as ddim or dpmpp_2m_karras.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "-g", help="Guidance scale.")] = None,
    eta: Annotated[float, typer.Option("--eta", help="Noise of the DDIM sampler, 0 to 1.")] = 0.0,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels.")] = None,
    count: Annotated[int, typer.Option("--count", "-c", help="Pictures per prompt.")] = 1,
    init_image: Annotated[Path | None, typer.Option("--init-image", help="Picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Repaint only the white area of this picture.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="How far to leave the initial picture.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file for one picture, or a folder.")] = Path(),
    grid: Annotated[Path | None, typer.Option("--grid", help="Also write all pictures, labelled, as one PNG.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Hold one stage's engines at a time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print paths, seeds and timings as JSON.")] = False,
) -> None:
    """Turn prompts into pictures."""
    texts = _prompts(prompts, prompt_file)
    width, height = parse_size(size) if size else (None, None)
    single = output.suffix.lower() == ".png"
    if output.suffix and not single and not output.is_dir():
        raise RequestError(f"output {output} is neither a .png file nor a folder: pictures are written as PNG")
    if single and output.is_dir():
        raise RequestError(f"output {output} is a folder with the name of a picture: name a file in it")
    if single and len(texts) * count != 1:
        raise RequestError(f"output {output} is one file for {len(texts) * count} pictures: give a folder")
    if grid is not None and grid.suffix.lower() != ".png":
        raise RequestError(f"grid {grid} is not a .png file: grids are written as PNG")
    from dataclasses import asdict

    from ..pictures import image as images
    from ..pipeline import Pipeline
    from .pictures import PictureWriter

    settings = backend_options(backend, options, threads=threads)
    began = time.perf_counter()
    with (
        progress_bar("generating") as progress,
        Pipeline.open(bundle or _embedded(), backend, low_memory=low_memory, progress=progress, **settings) as pipe,
    ):
        opened = time.perf_counter()
        described = {"bundle": pipe.bundle.manifest.source.get("name"), "precision": pipe.bundle.manifest.precision}
        with PictureWriter(output if single else None, output, described) as writer:
            try:
                result = pipe(
                    texts,
                    negative,
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    num_images_per_prompt=count,
                    seed=seed,
                    sampler=sampler,
                    eta=eta,
                    image=init_image,
                    mask_image=mask,
                    strength=strength,
                    on_batch=writer,
                    progress=progress,
                )
            except BaseException:  # what was finished is on disk: say where
                rescued = writer.rescued()
                if as_json and rescued:
                    typer.echo(json.dumps({"images": rescued}, indent=2))
                elif not as_json:
                    _echo(rescued)
                raise
            done = time.perf_counter()
            entries = writer.entries()
            write = time.perf_counter() - done
    if grid is not None:
        sheet = images.grid(result.images, [entry["prompt"] for entry in entries])
        write_atomically(grid, images.encode_png(sheet))
    if not as_json:
        _echo(entries)
        if grid is not None:
            typer.echo(str(grid))
        return
    assert result.request is not None
    report = {
        "images": entries,
        "timings": {"open": opened - began, **asdict(result.timings), "write": write},
        "memory": result.memory,
        "request": {**result.request.model_dump(mode="json"), **described},
        "warnings": result.warnings,
    }
    typer.echo(json.dumps(report, indent=2))


def _echo(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        typer.echo(f"{entry['path']}  seed {entry['seed']}  {entry['prompt']}")


def _embedded() -> Path:
    """Return the embedded model's bundle, exported at first use."""
    try:
        from ...export.embedded import ensure_bundle
    except ImportError as error:
        raise MissingExtraError("export", "the embedded model") from error
    with progress_bar("exporting the embedded model") as progress:
        return ensure_bundle(progress=progress)


def _prompts(arguments: list[str] | None, file: Path | None) -> list[str]:
    """Return prompts from the arguments, from standard input for `-`, or one a line from a file."""
    if bool(arguments) == bool(file):
        raise RequestError("give prompts either as arguments (- for standard input) or with --prompts FILE")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"prompts file {file} cannot be read as UTF-8 text: {error}") from error
    elif arguments == ["-"]:
        text = sys.stdin.read()
    else:
        return list(arguments or [])
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise RequestError(f"{file or 'standard input'} holds no prompts: write one a line")
    return prompts
