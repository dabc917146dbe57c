"""`make demo`: pictures of the embedded model in one labelled grid, and the same work done by diffusers beside it."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ..engines.errors import LatentRTError
from ..engines.files import write_atomically
from ..engines.machine import physical_cores
from ..engines.progress import Progress
from ..runtime.pictures.png import encode_png, grid
from ..runtime.pipeline import Pipeline
from .contenders import STAGES
from .contenders.process import Worker
from .measure.method import SETTLE_MOST, SETTLE_SECONDS
from .measure.workloads import Workload, workload
from .quality.fidelity import fidelity

PROMPTS = (
    "a red circle on a blue background",
    "a large yellow star on a purple background",
    "a small green ring on a white background",
    "a black cross on an orange background",
    "a pink triangle left of a cyan square on a black background",
    "a white star right of a red ring on a green background",
    "a blue square above a yellow circle on a gray background",
    "a purple cross below an orange triangle on a white background",
)
WARMUP, ROUNDS = 2, 5


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for grid.png")
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    console = Console(soft_wrap=True)
    try:
        bundle = _bundle(console)
        _grid(console, bundle, arguments.output / "grid.png", arguments.threads)
        _side_by_side(console, bundle, workload("embedded"), arguments.threads)
    except LatentRTError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return 1
    return 0


def _bundle(console: Console) -> Path:
    from ..export.embedded import bundle_path, ensure_bundle

    if bundle_path().exists():
        console.print(f"embedded model: {bundle_path()}")
        return bundle_path()
    console.print("exporting the embedded model, once (about a minute)")
    start = time.perf_counter()
    with _progress(console, "exporting") as progress:
        path = ensure_bundle(progress=progress)
    console.print(f"exported in {time.perf_counter() - start:.0f} s: {path}")
    return path


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Progress]:
    """Yield a function that keeps one line about what is being done, where the console is a terminal."""
    with console.status(what) as status:
        yield lambda stage, done, total: status.update(f"{what}: {stage} {done} of {total}")


def _grid(console: Console, bundle: Path, path: Path, threads: int) -> None:
    with _progress(console, "drawing") as progress, Pipeline.open(bundle, threads=threads, progress=progress) as pipe:
        start = time.perf_counter()
        result = pipe(PROMPTS, seed=0, num_inference_steps=20, progress=progress)
        seconds = time.perf_counter() - start
    write_atomically(path, encode_png(grid(result.images, PROMPTS, columns=4)))
    console.print(f"{path}: {len(PROMPTS)} prompts, 20 steps each, {seconds:.1f} s\n")


def _side_by_side(console: Console, bundle: Path, work: Workload, threads: int) -> None:
    """Do the same request in latentrt and in diffusers, by turns in two processes, and print where the time goes."""
    from ..export.embedded import CHECKPOINT

    names = {"latentrt": "latentrt/onnxruntime-cpu/step", "diffusers": "diffusers/eager"}
    console.print(f"the same request by turns in two processes, median of {ROUNDS} after {WARMUP} warm-up requests:")
    console.print(
        f'"{work.prompt}", {work.width}×{work.height}, {work.steps} steps, guidance {work.guidance:g}, '
        f"seed {work.seed}, fp32, {threads} threads"
    )
    with tempfile.TemporaryDirectory() as folder, console.status("opening both") as status:
        saved = {name: Path(folder) / f"{name}.npz" for name in names}
        workers = {name: Worker(contender, threads) for name, contender in names.items()}
        try:
            facts = {}
            for name, worker in workers.items():
                status.update(f"opening {name}")
                facts[name] = worker.prepare(
                    **work.as_request(), bundle=str(bundle), checkpoint=str(CHECKPOINT), device="cpu"
                )
                for _ in range(WARMUP):
                    worker.run(work.as_request(), save=saved[name])
                worker.settle(SETTLE_SECONDS, SETTLE_MOST)
            status.update("measuring")
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
            for _ in range(ROUNDS):
                for name, worker in workers.items():
                    runs[name].append(worker.run(work.as_request()))
                    worker.settle(SETTLE_SECONDS, SETTLE_MOST)
        finally:
            for worker in workers.values():
                worker.close()
        same = fidelity(saved["latentrt"], saved["diffusers"])
    console.print(_table(facts, runs))
    console.print(
        f"max pixel difference {same.max_pixel_difference} of 255, "
        f"latents differ by {same.latents_relative_error:.1e} (relative)"
    )


def _table(facts: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("", *facts, "ratio", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    middle = {name: _medians(samples) for name, samples in runs.items()}
    rows: list[tuple[str, dict[str, float], str]] = [
        ("import", {name: f["import"] for name, f in facts.items()}, "s"),
        ("open", {name: f["open"] for name, f in facts.items()}, "s"),
        *((stage, {name: m[stage] for name, m in middle.items()}, "ms") for stage in STAGES),
        ("request", {name: m["total"] for name, m in middle.items()}, "ms"),
        ("memory", {name: max(r["peak_bytes"] for r in samples) for name, samples in runs.items()}, "MiB"),
    ]
    scale = {"s": 1.0, "ms": 1e-3, "MiB": 2.0**20}
    digits = {"s": 2, "ms": 1, "MiB": 0}
    for label, values, unit in rows:
        shown = [f"{value / scale[unit]:,.{digits[unit]}f} {unit}" for value in values.values()]
        ours, theirs = values.values()
        style = "bold" if label == "request" else ""
        table.add_row(label, *shown, f"{theirs / ours:.1f} ×" if ours else "", style=style)
    return table


def _medians(samples: list[dict[str, Any]]) -> dict[str, float]:
    stages = {stage: median(sample["stages"][stage] for sample in samples) for stage in STAGES}
    return {**stages, "total": median(sample["total"] for sample in samples)}


if __name__ == "__main__":
    sys.exit(main())
