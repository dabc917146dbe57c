"""Around a server: `latentrt plan`, `latentrt bench serve` and `latentrt triton-repository`."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ...engines.errors import MissingExtraError, RequestError
from ..loop import widths
from ..sizes import check_size, parse_size
from .errors import bench_extra
from .options import BackendOptions, backend_options, check_backend, opened_bundle

MIX = typer.Option(
    "--mix", help="What is asked for: draft, typical, equal, or a JSON file with steps, samplers and guided."
)
CURVE = "Step-time curve: a100-sd15, cpu-embedded, h200-qwen512, h200-sd15, h200-sdxl, or a JSON file"
SLOTS = typer.Option("--slots", min=1, max=512, help="Pictures in flight on a device (default: 16 or, if fewer, rows).")
ROWS = typer.Option("--rows", min=2, max=1024, help="Network rows that they share.")
QUEUE = typer.Option("--queue", min=1, help="Pictures that may wait for a device; more are turned away.")


def plan(
    rate: Annotated[float, typer.Option("--rate", help="Pictures a second, of all devices together.")],
    p99: Annotated[float, typer.Option("--p99", help="Seconds within which 99 % of them are to be answered.")],
    curve: Annotated[str, typer.Option("--curve", help=f"{CURVE}.")],
    mix: Annotated[str, MIX] = "typical",
    slots: Annotated[int | None, SLOTS] = None,
    rows: Annotated[int, ROWS] = 16,
    queue: Annotated[int, QUEUE] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the simulated requests.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG file: latency against rate, for every way to share a device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how many devices a load needs, by simulation with the batcher's own policy; nothing is measured."""
    from ...benchmarks.serving import mixes, planner
    from ...benchmarks.serving.curve import curve as named
    from ...benchmarks.serving.simulate import Setup

    setup, asked = Setup(named(curve), slots or min(16, rows), rows, queue), mixes.mix(mix)
    found = planner.plan(setup, asked, rate, p99, seed=seed)
    if as_json:
        about = {"curve": setup.curve.as_record(rows), "mix": asked.name}
        typer.echo(json.dumps(found.as_record() | about, indent=2))
    else:
        typer.echo(planner.text(found, setup, asked, rate, p99))
    if plot is not None:
        from ...engines.files import write_atomically

        try:
            from ...benchmarks.serving import plot as drawing
        except ModuleNotFoundError as error:
            raise MissingExtraError("bench", "a plot") from error
        write_atomically(plot, drawing.latency(setup, asked, rate=found.rate, p99=p99))


def bench_serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle (default: the embedded model); it is not drawn with --curve.")
    ] = None,
    curve: Annotated[
        str | None, typer.Option("--curve", help=f"{CURVE}: a paced device, which sleeps (default: real engines).")
    ] = None,
    scale: Annotated[
        float, typer.Option("--scale", help="What the curve's times are multiplied by, to be done sooner.")
    ] = 1.0,
    mix: Annotated[list[str] | None, MIX] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help='"in-flight", "one at a time", "static equal", "static unlike" (default: each of them).'
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option("--point", help="saturation, load (70 and 90 %), bounded (default: each of them)."),
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option("--rate", help="A further rate, in pictures a second, or POLICY=RATE of one.")
    ] = None,
    base: Annotated[
        float | None, typer.Option("--base", help="What loads are shares of (default: the baselines' saturation).")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Length of a point, about.")] = 60.0,
    turns: Annotated[
        int,
        typer.Option("--turns", min=1, help="Parts of a point at a rate: policies and rates take turns."),
    ] = 1,
    slots: Annotated[int | None, SLOTS] = None,
    rows: Annotated[int, ROWS] = 16,
    queue: Annotated[int, QUEUE] = 32,
    in_process: Annotated[bool, typer.Option("--in-process", help="Leave out HTTP.")] = False,
    backend: Annotated[str, typer.Option("--backend", help="Backend of real engines.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads of real engines.")] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="WxH", help="Of pictures of real engines (default: the bundle's).")
    ] = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and requests.")] = 0,
    save_curve: Annotated[
        Path | None, typer.Option("--save-curve", help="Write the measured curve of real engines, and do no more.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of records (default: this machine's own).")
    ] = None,
) -> None:
    """Put load on a server, in flight and as baselines, and append a record for each point."""
    with bench_extra():
        from ...benchmarks.measure import machine
        from ...benchmarks.report import page as report
        from ...benchmarks.report import records
        from ...benchmarks.serving import bench, mixes, process, real
    for name, value in (("scale", scale), ("seconds", seconds)):
        if not 0 < value < 1e6:
            raise RequestError(f"--{name} is {value!r}: give a number above 0")
    check_backend(backend)
    of_engines = {"size": size, "threads": threads, "save-curve": save_curve, "backend": backend != "auto"}
    if curve is not None and (given := [f"--{name}" for name, value in of_engines.items() if value]):
        raise RequestError(f"--curve is {curve}: a paced device has no engines; leave {' and '.join(given)} out")
    began = time.monotonic()

    def say(line: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.1f} s  {line}", err=True)

    if save_curve is not None:
        found = real.measure(bundle, backend, threads, rows, name=save_curve.stem, size=size)
        typer.echo(real.save(found, save_curve))
        return
    options = bench.Options(
        mixes=[mixes.mix(each) for each in mix or ("draft", "typical")],
        policies=bench.policies(policy),
        points=tuple(point or (() if rate else bench.POINTS)),
        rates=tuple(bench.rate(each) for each in rate or ()),
        base=base,
        seconds=seconds,
        turns=turns,
        http=not in_process,
        seed=seed,
        command=f"latentrt {shlex.join(sys.argv[1:])}",
    )
    path = output or records.default_file(machine.describe_machine())
    records.check_writable(path)
    wanted = process.Place(
        "in-flight",
        curve or "",
        paced=curve is not None,
        scale=scale,
        slots=slots or min(16, rows),
        rows=rows,
        queue=queue,
        bundle=None if bundle is None else str(bundle),
        backend=backend,
        threads=threads,
        size=size,
    )
    with records.Journal(path, say) as journal, real.measured(wanted, say) as where:
        made = bench.run(where, options, say, journal.keep)
        records.append(path, made, show=typer.echo)
    typer.echo(f"records: {path}\n")
    typer.echo(report.text(made))


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
    slots: Annotated[int, typer.Option("--slots", min=1, help="Pictures that are drawn at one time.")] = widths.SLOTS,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=2, help="Network rows that they share (default: 2 each up to 8, or 1 each)."),
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

    widths.check_numbers(slots, rows, max_waiting, None)
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
