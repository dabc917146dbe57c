"""`latentrt bench`: measure workloads, write the report, compare two sets of records."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ...engines.errors import RequestError
from ..sizes import parse_size
from .errors import bench_extra
from .options import opened_bundle
from .serving import bench_serve


class _WorkloadGroup(TyperGroup):
    """A group whose command `run` needs no name: what is no command is a workload."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, `run` when the first word names none."""
        known = bool(args) and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


app = typer.Typer(cls=_WorkloadGroup, add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure latentrt beside what else could run: `latentrt bench WORKLOAD`, `bench report`, `bench compare A B`."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    workload: Annotated[str, typer.Argument(help="embedded, sd15-512, …; any other word lists them all.")],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Pictures in one request.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16 or bf16 (default: fp32 on a processor).")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Your own diffusers folder instead of random weights.")
    ] = None,
    contenders: Annotated[
        str | None, typer.Option("--contenders", help="Beginnings of contenders' names, with commas (default: all).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads (default: all).")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Measured requests of each.")] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Requests before them.")] = 2,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy", help="Also modes of latentrt that are not exact: forecasts, guidance in part, other decoders."
        ),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside", metavar="BUNDLE", help="Also a bundle of the same checkpoint made another way; repeatable."
        ),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option("--pictures", min=2, help="Pictures that are judged, and compared (default: 40, or 8)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, no cold processes, no scenarios.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Study growth with steps, batch and size instead.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Export again, to measure it.")] = False,
    memory: Annotated[float, typer.Option("--memory", help="GiB that all contenders may hold together.")] = 16.0,
    slow: Annotated[
        str | None,
        typer.Option("--slow", help="GRAPH=SHARE: draw out a graph of latentrt, to see that a comparison finds it."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of records (default: this machine's own)."),
    ] = None,
) -> None:
    """Measure a workload with every contender that is installed; append records and write a page beside them."""
    with bench_extra():
        from ...benchmarks.measure import bench as benchmark
        from ...benchmarks.measure import machine, workloads
        from ...benchmarks.measure import scaling as growth
        from ...benchmarks.report import page as report
        from ...benchmarks.report import records
    width, height = parse_size(size) if size else (None, None)
    chosen = machine.default_device() if device == "auto" else device
    if device == "cuda" and machine.default_device() != "cuda":
        raise RequestError("device is 'cuda': no NVIDIA GPU answers on this machine; give cpu or auto")
    if output is not None and output.is_dir():
        raise RequestError(f"output {output} is a folder: name a .jsonl file")
    path = output or records.default_file(machine.describe_machine())
    records.check_writable(path)
    work = workloads.workload(workload).but(
        steps=steps,
        batch=batch,
        width=width,
        height=height,
        guidance=guidance,
        precision=workloads.precision(precision, chosen, workloads.workload(workload).family),
    )
    options = benchmark.Options(
        device=chosen,
        contenders=contenders.split(",") if contenders else None,
        lossy=lossy,
        beside=[opened_bundle(each).path for each in beside or ()],
        warmup=warmup,
        rounds=rounds,
        memory_limit=int(memory * 2**30),
        checkpoint=checkpoint,
        fresh=fresh,
        pictures=pictures,
        slow=_shares(slow),
        command=f"latentrt {shlex.join(sys.argv[1:])}",
    )
    if threads is not None:
        options.threads = threads
    if quick:
        options.budget, options.cold, options.server_seconds, options.pictures = 8.0, 0, 0.0, pictures or 0
    began = time.monotonic()

    def say(line: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.1f} s  {line}", err=True)

    with records.Journal(path, say) as journal:
        found = (growth.study if scaling else benchmark.run)(work, options, say, journal.keep)
        records.append(path, found, show=typer.echo)
    typer.echo(f"records: {path}")
    typer.echo(f"page:    {report.write_page(records.read(path), path.with_suffix('.html'))}\n")
    typer.echo(report.text(found))


@app.command("report")
def write_report(
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="FILES", help="Record files (default: all in the folder of records).")
    ] = None,
    readme: Annotated[Path | None, typer.Option("--readme", help="File whose small table is replaced.")] = None,
    tables: Annotated[Path | None, typer.Option("--tables", help="File whose tables are replaced.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="PNG file of the chart that is written.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if a file's tables are out of date.")
    ] = False,
) -> None:
    """Write pages and plots from records; without FILES in a source tree, the tables and images of README and docs."""
    with bench_extra():
        from ...benchmarks.report import page as report
        from ...benchmarks.report import records
    folder = records.results_folder()
    paths = results or sorted(folder.glob("*.jsonl"))
    if not paths:
        raise RequestError(f"no records in {folder}: run `latentrt bench embedded` first")
    found = [record for path in paths for record in records.read(path)]
    images = paths[0].parent / "plots"
    if (root := records.checkout()) and not results:
        readme, tables = readme or root / "README.md", tables or root / "docs" / "benchmarks.md"
        images = root / "docs" / "images"
        chart = chart or images / "latency.png"
    if check and not (readme or tables):
        raise RequestError("nothing to check: name a file with --readme or --tables")
    current = [report.update_summary(readme, found, write=not check)] if readme else []
    current += [report.update_tables(tables, found, write=not check)] if tables else []
    if check:
        raise typer.Exit(0 if all(current) else 1)
    written = [report.write_page(records.read(path), path.with_suffix(".html")) for path in paths]
    written += report.write_plots(found, images)
    written += [report.write_chart(chart, found)] if chart else []
    for path in (*written, readme, tables):
        if path is not None:
            typer.echo(path)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(metavar="A", help="Record file; FILE@RUN takes one run of it.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Record file of later runs.")],
) -> None:
    """Say what changed beyond noise from A to B; exit 1 when anything got worse."""
    with bench_extra():
        from ...benchmarks.report import compare as comparison
        from ...benchmarks.report import records
    found = comparison.compare(records.read_run(before), records.read_run(after))
    if not found.compared:
        raise RequestError(f"{before} and {after} have no work and contender in common: nothing can be compared")
    for line in comparison.lines(found):
        typer.echo(line)
    raise typer.Exit(1 if found.regressed else 0)


@app.command()
def quality(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    prompt_file: Annotated[Path, typer.Option("--prompts", help="File with one prompt a line.")],
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes", help="Modes beside the exact run, with commas: taylor, openvino-bf16, openvino-bf16+taylor."
        ),
    ] = None,
    clip: Annotated[Path | None, typer.Option("--clip", help="Local CLIP folder, for the CLIP score.")] = None,
    pick: Annotated[Path | None, typer.Option("--pickscore", help="Local PickScore folder.")] = None,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="AlexNet's weights, a .pth file, for LPIPS.")] = None,
    inception: Annotated[Path | None, typer.Option("--inception", help="FID Inception weights, a .pth file.")] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Inception statistics of real pictures (.npz), for FID.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first picture.")] = 0,
) -> None:
    """Score pictures of a list of prompts with networks you have, or what modes that are not exact cost on it."""
    from .generate import read_prompts

    if not (clip or pick or inception or modes):
        raise RequestError(
            "no score was asked for: give --clip, --pickscore or --inception with local weights, or --modes"
        )
    if modes and inception:
        raise RequestError("--inception scores one list of pictures: leave out --modes")
    if lpips and not modes:
        raise RequestError("--lpips is a distance to the exact run: say with --modes of what")
    if reference and not inception:
        raise RequestError("--reference is for the FID of --inception: give both, or leave it out")
    prompts = read_prompts(None, prompt_file)
    with bench_extra():
        from ...benchmarks.quality import deltas, scores
        from ...benchmarks.report.quality_tables import costs_table
    named = {name: deltas.mode_named(name) for name in (modes.split(",") if modes else ())}
    clips: dict[str, Any] = {
        "clip": scores.ClipFeatures(clip) if clip else None,
        "pick": scores.ClipFeatures(pick) if pick else None,
    }
    if named:
        distance = deltas.lpips_distance(lpips) if lpips else None
        for mode in named.values():  # before hours are spent on those in front
            scores.check(bundle, prompts, steps, **vars(mode))
        exact = scores.draw(bundle, prompts, steps, seed)
        drawn = {name: scores.draw(bundle, prompts, steps, seed, **vars(mode)) for name, mode in named.items()}
        typer.echo(costs_table(deltas.costs(drawn, exact, prompts, scores.paired(**clips), distance)).markdown())
        return
    networks: dict[str, Any] = {
        "inception": scores.inception_features(inception) if inception else None,
        "reference": scores.moments(reference) if reference else None,
    }
    found = scores.scores(scores.draw(bundle, prompts, steps, seed), prompts, **clips, **networks)
    within = scores.bounds(found)
    for name, value in found.items():
        bound = f"  MLPerf SDXL: {'within' if within[name] else 'outside'} the bounds" if name in within else ""
        typer.echo(f"{name:<20}{value:>12.4f}{bound}")


app.command("serve")(bench_serve)


def _shares(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    name, _, share = text.partition("=")
    try:
        return {name: float(share)}
    except ValueError as error:
        raise RequestError(f"slow is {text!r}: give GRAPH=SHARE, such as decoder=0.1") from error
