"""`latentrt triton-repository`: a bundle as a model of NVIDIA's Triton Inference Server."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..sizes import check_size, parse_size
from .options import BackendOptions, backend_options, opened_bundle


class InstanceChoice(str, Enum):
    """Where Triton starts the model."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


def triton_repository(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the model repository, new or not.")],
    name: Annotated[str | None, typer.Option("--name", help="Name of the model (default: the bundle's).")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the bundle's files (default: a link).")] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="WxH", help="Size to warm up (default: the bundle's); may be repeated."),
    ] = None,
    sizes_only: Annotated[bool, typer.Option("--sizes-only", help="Refuse other sizes.")] = False,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Pictures that are drawn at one time.")] = 4,
    rows: Annotated[
        int | None, typer.Option("--rows", min=2, help="Network rows that they share (default: 2 for each).")
    ] = None,
    fixed_rows: Annotated[
        bool,
        typer.Option("--fixed-rows", help="Compute all rows always: the same picture bit for bit in any company."),
    ] = False,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Pictures of a size that may wait.")] = 64,
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    instances: Annotated[
        InstanceChoice, typer.Option("--instances", help="One on each GPU, one on the processor, or what there is.")
    ] = InstanceChoice.auto,
    python_path: Annotated[
        list[Path] | None,
        typer.Option(
            "--python-path", metavar="FOLDER", help="Folder of packages that Triton's Python lacks; may be repeated."
        ),
    ] = None,
) -> None:
    """Write a model repository that Triton serves with its Python backend."""
    from ..triton.repository import write_repository
    from ..triton.settings import TritonSettings

    opened = opened_bundle(bundle)
    chosen = [parse_size(text) for text in sizes or ()]
    for size in chosen:
        check_size(*size, opened.manifest.latent)
    settings = TritonSettings(
        backend=backend,
        options=backend_options(backend, options, threads=threads),
        slots=slots,
        rows=rows,
        fixed_rows=fixed_rows,
        max_waiting=max_waiting,
        sizes=chosen,
        sizes_only=sizes_only,
    )
    named = re.sub(r"[^A-Za-z0-9._-]", "-", opened.path.name).lstrip("._-") or "latentrt"
    paths = [path.absolute() for path in python_path or ()]
    folder = write_repository(
        opened, output, settings, name=name or named, copy=copy, kind=instances.value, python_path=paths
    )
    typer.echo(f"{folder}: tritonserver --model-repository {output.absolute()}")
