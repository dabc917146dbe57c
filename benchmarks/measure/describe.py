"""From what was seen of one contender to the part of its record that is its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ..contenders import NETWORKS, in_bf16
from . import roofline
from .method import Measured, paired_ratio
from .statistics import summarize
from .workloads import Workload


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
        "ratio_to_first": paired_ratio(entry),
        "turns_with": entry.turns_with,
        "memory": {
            "peak_bytes": entry.peak_bytes,
            "together_bytes": entry.together_bytes,
            "device_bytes": entry.device_bytes,
            "by_stage": entry.memory,
        },
        "joules": summarize(entry.joules) if entry.joules else None,
        "orchestration": orchestration,
        "roofline": _roofline(entry, work, bundle, limits(entry.name, ceiling)),
    }


def limits(name: str, ceiling: dict[str, Any]) -> tuple[float | None, float]:
    """Return the most operations and bytes a second for a contender; none in bf16 where that was not measured."""
    return ceiling.get("flops_bf16") if in_bf16(name) else ceiling["flops"], ceiling["bytes"]


def _roofline(entry: Measured, work: Workload, bundle: Bundle, most: tuple[float | None, float]) -> dict[str, Any]:
    """Return, for each network, operations, bytes, the machine's limit, and the share of it that was reached.

    Who computes in bf16 moves half of the bytes.
    """
    rows = {}
    flops, bandwidth = most
    for name, stage in NETWORKS.items():
        runs = entry.samples[0]["evaluations"] if name == "denoiser" else 1
        cost = roofline.graph_cost(
            bundle,
            name,
            batch=work.batch,
            guidance=work.guidance,
            height=work.height,
            width=work.width,
            prompt=work.prompt,
        )
        if in_bf16(entry.name):
            cost = replace(cost, bytes=cost.bytes / 2)
        limit = cost.limit_seconds(flops, bandwidth) if flops else None
        took = np.median([s.get("networks", {}).get(name, s["stages"][stage]) for s in entry.samples]) / runs
        row: dict[str, Any] = {"operations": cost.operations, "bytes": cost.bytes, "limit_seconds": limit, "runs": runs}
        rows[name] = row | {"seconds": float(took), "share_of_limit": float(limit / took) if took and limit else None}
    return rows
