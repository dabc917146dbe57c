"""`latentrt bench WORKLOAD`: one run over all contenders, from checkpoint to records."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ...engines.cache import home
from ...engines.errors import EngineError, RequestError
from .. import contenders
from ..contenders.process import Worker, run_process
from ..quality.fidelity import fidelity
from ..report.records import Record
from . import machine, method, roofline, scenarios
from .cold import measure_cold
from .method import Measured, Plan
from .statistics import summarize
from .workloads import Say, Workload, ensure_model

ORACLE_PICTURES = 40
NETWORKS = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}
LARGE = 2**31
"""Bytes of weights above which the CPU measures one mode of latentrt: its modes differ by microseconds there."""


@dataclass
class Options:
    """What a run of the benchmark may be told."""

    device: str = "cpu"
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    contenders: Sequence[str] | None = None
    warmup: int = 2
    rounds: int | None = None
    budget: float = 30.0
    cold: int = 2
    server_seconds: float = 8.0
    oracle: int = ORACLE_PICTURES
    memory_limit: int = 16 * 2**30
    checkpoint: Path | None = None
    fresh: bool = False
    slow: dict[str, float] = field(default_factory=dict)
    command: str = ""


def run(work: Workload, options: Options, say: Say) -> list[Record]:
    """Measure a workload and return one record for each contender, missing and failed ones too."""
    watch = machine.LoadWatch()
    began = time.monotonic()
    found = contenders.choose(options.device, options.contenders)
    model = ensure_model(work, checkpoint=options.checkpoint, fresh=options.fresh, say=say)
    if options.contenders is None and options.device == "cpu" and model.weight_bytes > LARGE:
        found = [c for c in found if not c.ours or c.name.endswith("/step")]
    names = [c.name for c in found if c.missing is None]
    if not names:
        raise RequestError("; ".join(f"{c.name}: {c.missing}" for c in found))
    say("measuring the machine's ceiling")
    ceiling = _ceiling(work, options)
    extras: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            work,
            model,
            options.device,
            options.threads,
            Path(folder),
            warmup=options.warmup,
            rounds=options.rounds,
            budget=options.budget,
            memory_limit=options.memory_limit,
            slow=options.slow,
            say=say,
            meter=machine.DeviceMeter.open() if options.device == "cuda" else None,
        )
        build = _build(names, plan)
        lead = next((name for name in names if name.startswith("latentrt/")), "")
        plan.after = lambda worker, measured: _scenarios(worker, measured, plan, options, lead, extras[measured.name])
        measured = method.measure(names, plan)
        reference = _reference(measured, plan)
        for name, entry in measured.items():
            if reference is not None and entry.answer is not None:
                extras[name]["fidelity"] = fidelity(entry.answer, reference).as_record()
            if name.startswith("latentrt/") and entry.facts:
                entry.facts["build"] = build
    if options.cold:
        say("cold processes, from shell to PNG")
        for name, cold in measure_cold(names, work, model, options.device, options.threads, options.cold).items():
            extras[name]["cold"] = cold
    bundle = Bundle.open(model.bundle)
    common = {
        "run": uuid.uuid4().hex[:12],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds_of_run": time.monotonic() - began,
        "command": options.command,
        "source": machine.source_version(),
        "machine": machine.describe_machine(),
        "conditions": _conditions(plan, names, watch),
        "workload": work.as_request(),
        "model": {
            "weights": model.weights,
            "bytes": model.weight_bytes,
            "sampler": bundle.manifest.scheduler["_class_name"],
            "export_seconds": model.export_seconds,
            "export_peak_bytes": model.export_peak_bytes,
        },
        "ceiling": ceiling,
    }
    return [_record(c, measured.get(c.name), common, extras.get(c.name, {}), bundle, work) for c in found]


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


def describe(entry: Measured, work: Workload, bundle: Bundle, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a record that follows from one contender's samples."""
    stages = {stage: [s["stages"][stage] for s in entry.samples] for stage in entry.samples[0]["stages"]}
    steps = [step for s in entry.samples for step in s["steps"]]
    samples = {"total": entry.seconds, **stages}
    seconds = {name: summarize(values) for name, values in samples.items()}
    if steps:
        seconds["step"] = summarize(steps)
    orchestration = None
    if all(s.get("networks") for s in entry.samples):
        shares = [1 - sum(s["networks"].get(name, 0) for name in NETWORKS) / s["total"] for s in entry.samples]
        orchestration = summarize(shares)
    facts = entry.facts
    return {
        "who": {"versions": facts["versions"], "options": facts["options"]},
        "seconds": seconds,
        "samples": samples,
        "start": {name: facts[name] for name in ("import", "open", "build")} | {"first_request": entry.warmup[0]},
        "warmup": entry.warmup,
        "launches": entry.launches,
        "ratio_to_first": method.paired_ratio(entry),
        "turns_with": entry.turns_with,
        "memory": {
            "peak_bytes": entry.peak_bytes,
            "together_bytes": entry.together_bytes,
            "device_bytes": entry.device_bytes,
            "by_stage": entry.memory,
        },
        "joules": summarize(entry.joules) if entry.joules else None,
        "orchestration": orchestration,
        "roofline": _roofline(entry, work, bundle, ceiling),
    }


def _roofline(entry: Measured, work: Workload, bundle: Bundle, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Return, for each network, operations, bytes, the machine's limit, and the share of it that was reached."""
    rows = {}
    branches = 2 if work.guidance > 1 else 1
    for name, stage in NETWORKS.items():
        runs = entry.samples[0]["evaluations"] if name == "denoiser" else 1
        cost = roofline.graph_cost(
            bundle, name, batch=work.batch, branches=branches, height=work.height, width=work.width
        )
        limit = cost.limit_seconds(ceiling["flops"], ceiling["bytes"])
        took = np.median([s.get("networks", {}).get(name, s["stages"][stage]) for s in entry.samples]) / runs
        row: dict[str, Any] = {"operations": cost.operations, "bytes": cost.bytes, "limit_seconds": limit, "runs": runs}
        rows[name] = row | {"seconds": float(took), "share_of_limit": float(limit / took) if took else None}
    return rows


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


def _build(names: Sequence[str], plan: Plan) -> float | None:
    """Return the seconds in which latentrt builds all engines in an empty cache; the ordinary one is filled as well."""
    ours = next((name for name in names if name.startswith("latentrt/")), None)
    if ours is None:
        return None
    plan.say("building engines in an empty cache")
    folder = home() / "engines" / f".bench-{os.getpid()}"
    try:
        with Worker(ours, plan.threads) as worker:
            return float(worker.prepare(**plan.options(), fresh_cache=str(folder))["build"])
    except EngineError:  # it will fail again where it is measured, and be reported there
        return None


def _scenarios(worker: Worker, entry: Measured, plan: Plan, options: Options, lead: str, extra: dict[str, Any]) -> None:
    """Run MLPerf's scenarios once, while the contender is warm; for `lead`, the first of ours, the oracle as well."""
    if "scenarios" in extra:
        return
    work, name = plan.work, entry.name
    found: dict[str, Any] = {"SingleStream": scenarios.single_stream(entry.seconds)}
    extra["scenarios"] = found
    main = name in (contenders.REFERENCE, lead)
    short = plan.model.weight_bytes < LARGE or options.device == "cuda"
    if main and short:
        plan.say(f"scenarios of {name}")
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
    if work.family == "embedded" and options.oracle and name == lead:
        extra["oracle"] = _oracle(worker, work, options.oracle, plan)


def _oracle(worker: Worker, work: Workload, count: int, plan: Plan) -> dict[str, Any]:
    """Return the share of held-out prompts that the contender draws right, by kind of scene."""
    from ..quality import oracle

    plan.say(f"oracle score of {worker.contender}")
    file = plan.folder / "oracle.npz"

    def generate(prompts: list[str], seeds: list[int]) -> Any:
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            worker.run(work.but(prompt=prompt, seed=seed, batch=1).as_request(), save=file, latents=False)
            with np.load(file) as answer:
                pictures.append(answer["images"][0])
        return np.stack(pictures)

    return {kind: oracle.score(generate, kind, count // 2).right for kind in ("single", "pair")} | {"count": count}


def _reference(measured: dict[str, Measured], plan: Plan) -> Path | None:
    """Return diffusers' answer in fp32: what its contender gave, or an extra request to one that is opened for it."""
    entry = measured.get(contenders.REFERENCE)
    if entry is not None and entry.answer is not None and plan.work.precision == "fp32":
        return entry.answer
    known = {c.name: c.missing for c in contenders.candidates(plan.device)}
    if known[contenders.REFERENCE] is not None:
        return None
    plan.say("reference answer: diffusers in fp32")
    answer = plan.folder / "reference.npz"
    with Worker(contenders.REFERENCE, plan.threads) as worker:
        worker.prepare(**plan.options() | {"precision": "fp32"})
        worker.run(plan.work.as_request(), save=answer)
    return answer


def _conditions(plan: Plan, names: list[str], watch: machine.LoadWatch) -> dict[str, Any]:
    groups = method.groups(names, plan)
    turns = "all contenders" if len(groups) == 1 else "each with the first" if len(groups[0]) > 1 else "none: alone"
    return {
        "threads": plan.threads,
        "device": plan.device,
        "warmup": plan.warmup,
        "turns": turns,
        "memory_limit_bytes": plan.memory_limit,
        **watch.finish(),
    }
