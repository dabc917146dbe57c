"""`latentrt bench WORKLOAD`: one run over all contenders, from checkpoint to records."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ...engines.cache import home
from ...engines.errors import EngineError, RequestError
from ...engines.machine import physical_cores
from .. import contenders
from ..contenders.process import Worker, run_process
from ..quality.fidelity import fidelity
from ..report.records import Record
from . import machine, method, quality, scenarios
from .cold import measure_cold
from .describe import describe
from .method import Conditions, Measured
from .workloads import Model, Say, Workload, check_memory, ensure_model

Keep = Callable[[Record], None]
LARGE = 2**31
"""Bytes of weights above which the CPU measures one mode of latentrt: its modes differ by microseconds there."""


@dataclass
class Options:
    """What a run of the benchmark may be told."""

    device: str = "cpu"
    threads: int = field(default_factory=physical_cores)
    contenders: Sequence[str] | None = None
    lossy: bool = False
    beside: Sequence[Path] = ()
    """Further bundles of the same checkpoint: quantized, or with a denoiser in parts."""
    warmup: int = 2
    rounds: int | None = None
    budget: float = 30.0
    cold: int = 2
    server_seconds: float = 8.0
    pictures: int | None = None
    """How many are judged and compared; None: as many as usual."""
    memory_limit: int = 16 * 2**30
    checkpoint: Path | None = None
    fresh: bool = False
    slow: dict[str, float] = field(default_factory=dict)
    command: str = ""


def run(work: Workload, options: Options, say: Say, keep: Keep = lambda record: None) -> list[Record]:
    """Measure a workload and return one record for each contender, missing and failed ones too.

    `keep` gets each contender's record as soon as its rounds are done; fidelity and cold processes come later and are
    not in it yet. Raises `RequestError`, before anything is measured, when no contender can run or `slow` names what
    cannot be slowed.
    """
    watch = machine.LoadWatch()
    began = time.monotonic()
    found = contenders.choose(options.device, options.contenders, lossy=options.lossy)
    if options.checkpoint is None:
        check_memory(work, machine.memory_bytes(options.device))
    model = ensure_model(work, checkpoint=options.checkpoint, fresh=options.fresh, say=say)
    bundle = Bundle.open(model.bundle)
    found = contenders.of_bundle(found, bundle, work.height, work.width)
    found = contenders.beside(found, bundle, [Bundle.open(path) for path in options.beside])
    if options.contenders is None and options.device == "cpu" and model.weight_bytes > LARGE:
        found = [c for c in found if not c.ours or "/step" in c.name]
    names = [c.name for c in found if c.missing is None]
    if not names:
        raise RequestError("; ".join(f"{c.name}: {c.missing}" for c in found))
    check_slow(options, bundle)
    say("measuring the machine's ceiling")
    ceiling = _ceiling(work, options)
    conditions = Conditions(
        work,
        model,
        options.device,
        options.threads,
        warmup=options.warmup,
        rounds=options.rounds,
        budget=options.budget,
        memory_limit=options.memory_limit,
        slow=options.slow,
        bundles={c.name: c.bundle.path for c in found if c.bundle is not None},
        say=say,
        meter=machine.DeviceMeter.open() if options.device == "cuda" else None,
    )
    how = {
        "warmup": options.warmup,
        "turns": method.turns(names, conditions),
        "memory_limit_bytes": options.memory_limit,
    }
    run_id, extras = uuid.uuid4().hex[:12], {name: dict[str, Any]() for name in names}

    def common() -> dict[str, Any]:
        return {
            "run": run_id,
            "seconds_of_run": time.monotonic() - began,
            **machine.stamp(watch, options.command, options.device, options.threads, **how),
            "workload": work.as_request(),
            "model": _model_facts(model, bundle),
            "ceiling": ceiling,
        }

    def finished(seen: Measured) -> None:
        candidate = next(c for c in found if c.name == seen.name)
        keep(_record(candidate, seen, common(), extras[seen.name], bundle, work))

    measured = _measure(names, conditions, options, extras, finished)
    shared = common()
    return [_record(c, measured.get(c.name), shared, extras.get(c.name, {}), bundle, work) for c in found]


def check_slow(options: Options, bundle: Bundle) -> None:
    """Raise `RequestError` for a graph to be drawn out that the bundle lacks, or on a device where none can be."""
    graphs = [graph.name for graph in bundle.manifest.graphs]
    for name in options.slow:
        if name not in graphs:
            raise RequestError(f"slow is {name!r}: the bundle has no such graph; choose {', '.join(graphs)}")
        if options.device != "cpu":
            raise RequestError(f"slow is {name!r} on {options.device}: only engines on the CPU can be drawn out")


def _measure(
    names: Sequence[str],
    conditions: Conditions,
    options: Options,
    extras: dict[str, dict[str, Any]],
    finished: Callable[[Measured], None],
) -> dict[str, Measured]:
    """Return what was seen of each contender; `extras` gets what its record says besides: scenarios, fidelity, cold.

    An extra that fails is left out, and says so: what was measured before it stands.
    """
    lead = next((name for name in names if name.startswith("latentrt/")), "")

    def after(worker: Worker, seen: Measured) -> None:
        with _left_out(f"scenarios of {seen.name}", conditions.say):
            _scenarios(worker, seen, conditions, options, lead, extras[seen.name])
        finished(seen)

    conditions.after = after
    with tempfile.TemporaryDirectory() as folder:
        conditions.folder = Path(folder)
        build = _build(names, conditions)
        measured = method.measure(names, conditions)
        reference = None
        with _left_out("the reference answer", conditions.say):
            reference = _reference(measured, conditions)
        for name, entry in measured.items():
            if reference is not None and entry.answer is not None:
                extras[name]["fidelity"] = fidelity(entry.answer, reference).as_record()
            if name.startswith("latentrt/") and entry.facts:
                entry.facts["build"] = build
        for name, near in quality.nearness(measured, lead, conditions).items():
            extras[name]["quality"] = near
    if options.cold:
        conditions.say("cold processes, from shell to PNG")
        with _left_out("cold processes", conditions.say):
            for name, cold in measure_cold(names, conditions, options.cold).items():
                extras[name]["cold"] = cold
    return measured


@contextmanager
def _left_out(what: str, say: Say) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        say(f"{what} left out: {error}")


def _model_facts(model: Model, bundle: Bundle) -> dict[str, Any]:
    return {
        "weights": model.weights,
        "bytes": model.weight_bytes,
        "sampler": bundle.manifest.scheduler["_class_name"],
        "export_seconds": model.export_seconds,
        "export_peak_bytes": model.export_peak_bytes,
    }


def _record(
    candidate: contenders.Candidate,
    seen: Measured | None,
    common: dict[str, Any],
    extra: dict[str, Any],
    bundle: Bundle,
    work: Workload,
) -> Record:
    who = {"name": candidate.name, "title": candidate.title}
    if seen is None or seen.failure is not None:
        reason = seen.failure if seen else candidate.missing
        return {"kind": "missing", **common, "contender": who, "reason": reason}
    body = describe(seen, work, bundle, common["ceiling"])
    return {"kind": "latency", **common, "contender": who | body.pop("who"), **body, **extra}


def _ceiling(work: Workload, options: Options) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "latentrt.benchmarks.measure.ceiling",
        options.device,
        str(options.threads),
        work.precision,
    ]
    done = run_process(command, threads=options.threads)
    found: dict[str, Any] = json.loads(done.output)
    return found


def _build(names: Sequence[str], conditions: Conditions) -> float | None:
    """Return the seconds in which latentrt builds all engines in an empty cache; the ordinary one is filled as well."""
    ours = next((name for name in names if name.startswith("latentrt/")), None)
    if ours is None:
        return None
    conditions.say("building engines in an empty cache")
    folder = home() / "engines" / f".bench-{os.getpid()}"
    try:
        with Worker(ours, conditions.threads) as worker:
            return float(worker.prepare(**conditions.options(), fresh_cache=str(folder))["build"])
    except EngineError:  # it will fail again where it is measured, and be reported there
        return None


def _scenarios(
    worker: Worker, entry: Measured, conditions: Conditions, options: Options, lead: str, extra: dict[str, Any]
) -> None:
    """Run MLPerf's scenarios once, while the contender is warm; `lead`, and who is not exact, draw more pictures."""
    if "scenarios" in extra:
        return
    work, name = conditions.work, entry.name
    found: dict[str, Any] = {"SingleStream": scenarios.single_stream(entry.seconds)}
    extra["scenarios"] = found
    main = name in (contenders.REFERENCE, lead)
    short = conditions.model.weight_bytes < LARGE or options.device == "cuda"
    if main and short:
        conditions.say(f"scenarios of {name}")
        batches = [work.batch, 4 * work.batch]
        found["Offline"] = scenarios.offline(
            batches, lambda batch: float(worker.run(work.but(batch=batch).as_request())["total"])
        )
    else:
        rate = work.batch / float(np.median(entry.seconds))
        found["Offline"] = {"images_per_second": rate, "batch": work.batch, "by_batch": {str(work.batch): rate}}
    if main and options.server_seconds:
        found["Server"] = scenarios.server(
            entry.seconds, work.latency_bound, options.server_seconds, lambda: worker.run(work.as_request())
        )
    if options.pictures != 0 and short and (name == lead or not contenders.is_exact(name)):
        if work.family == "embedded":
            extra["oracle"] = quality.draw_scenes(worker, options.pictures or quality.SCENES, conditions)
        else:
            quality.draw_seeds(worker, options.pictures or quality.SEEDS, conditions)


def _reference(measured: dict[str, Measured], conditions: Conditions) -> Path | None:
    """Return diffusers' answer in fp32: what its contender gave, or an extra request to one that is opened for it."""
    entry = measured.get(contenders.REFERENCE)
    if entry is not None and entry.answer is not None and conditions.work.precision == "fp32":
        return entry.answer
    known = {c.name: c.missing for c in contenders.candidates(conditions.device)}
    if known[contenders.REFERENCE] is not None:
        return None
    conditions.say("reference answer: diffusers in fp32")
    answer = conditions.folder / "reference.npz"
    with Worker(contenders.REFERENCE, conditions.threads) as worker:
        worker.prepare(**conditions.options() | {"precision": "fp32"})
        worker.run(conditions.work.as_request(), save=answer)
    return answer
