"""How time and memory grow with steps, batch, pixels, and prompts times seeds; the growth is fitted, not assumed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from .. import contenders
from ..contenders.process import Worker
from ..report.records import Record
from . import machine
from .bench import Keep, Options
from .method import Conditions
from .statistics import power_law
from .workloads import Say, Workload, ensure_model

STEPS = (5, 10, 20, 40)
BATCHES = (1, 2, 4, 8)
SIDES = (0.5, 1.0, 1.5, 2.0)
"""Image sides, as multiples of the workload's."""
SWEEPS = ((1, 1), (2, 1), (2, 2), (4, 2))
"""Prompts and seeds of each."""
REPEATS = 3


def points(work: Workload, axis: str) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the size of each point on an axis and its request."""
    if axis == "steps":
        for steps in STEPS:
            yield steps, work.but(steps=steps).as_request()
    elif axis == "batch":
        for batch in BATCHES:
            yield batch, work.but(batch=batch).as_request()
    elif axis == "pixels":
        for factor in SIDES:
            height, width = (round(side * factor / 64) * 64 for side in (work.height, work.width))
            yield height * width, work.but(height=height, width=width).as_request()
    else:
        for prompts, seeds in SWEEPS:
            texts = [f"{work.prompt}, {number}" for number in range(prompts)]
            yield prompts * seeds, {**work.but(batch=seeds).as_request(), "prompt": texts}


AXES = ("steps", "batch", "pixels", "prompts × seeds")


def study(work: Workload, options: Options, say: Say, keep: Keep = lambda record: None) -> list[Record]:
    """Measure each axis with each contender, in a fresh process for each; return one record for each.

    `keep` gets each record as soon as it is made.

    Without a choice of contenders, latentrt's own mode and diffusers are measured.
    """
    model = ensure_model(work, checkpoint=options.checkpoint, say=say)
    chosen = [c for c in contenders.choose(options.device, options.contenders) if c.missing is None]
    if options.contenders is None:
        chosen = [c for c in chosen if c.name.endswith("/step") or c.name == contenders.REFERENCE]
    records = []
    for candidate in chosen:
        for axis in AXES:
            say(f"{candidate.name}: {axis}")
            watch = machine.LoadWatch()
            conditions = Conditions(work, model, options.device, options.threads)
            with Worker(candidate.name, options.threads) as worker:
                opened = worker.prepare(**conditions.options() | {"max_batch": max(BATCHES)})["resident_bytes"]
                measured = [_point(worker, x, request) for x, request in points(work, axis)]
            records.append(
                {
                    "kind": "scaling",
                    "axis": axis,
                    **machine.stamp(watch, options.command, options.device, options.threads),
                    "workload": work.as_request(),
                    "contender": {"name": candidate.name, "title": candidate.title},
                    "opened_bytes": opened,
                    "points": measured,
                    "fits": fits(measured, opened),
                }
            )
            keep(records[-1])
    return records


def _point(worker: Worker, x: float, request: dict[str, Any]) -> dict[str, Any]:
    """Return medians of one point after a request to warm up; `peak_bytes` is what the process ever held till then."""
    worker.run(request)
    replies = []
    for _ in range(REPEATS):
        time.sleep(0.02)
        replies.append(worker.run(request))
    stages = {stage: median(r["stages"][stage] for r in replies) for stage in replies[0]["stages"]}
    peak = max(reply["peak_bytes"] for reply in replies)
    return {"x": x, "seconds": median(r["total"] for r in replies), "stages": stages, "peak_bytes": peak}


def fits(measured: Sequence[dict[str, Any]], opened: int) -> dict[str, dict[str, float] | None]:
    """Return the exponents with which the request, its denoising, and memory above the opened process grow.

    None where nothing grows: memory, when a request needs no more than opening did.
    """
    x = [point["x"] for point in measured]
    series = {
        "request": [point["seconds"] for point in measured],
        "denoise": [point["stages"]["denoise"] for point in measured],
        "memory": [point["peak_bytes"] - opened for point in measured],
    }
    found: dict[str, dict[str, float] | None] = {}
    for name, values in series.items():
        fit = power_law(x, values) if min(values) > 0 else None
        found[name] = None if fit is None else {"exponent": fit.exponent, "error": fit.error, "factor": fit.factor}
    return found
