"""Records made of drawn samples, for tests of what reads records."""

from __future__ import annotations

from typing import Any

import numpy as np
from latentrt.benchmarks.measure.statistics import summarize
from latentrt.benchmarks.measure.workloads import workload

STAGES = {"tokenize": 2e-4, "encode": 2e-3, "prepare": 5e-4, "denoise": 0.3, "decode": 0.03, "png": 2e-3}
MACHINE = {
    "processor": "Test CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "system": "Linux",
    "python": "3.11",
    "gpu": None,
}


def latency_record(
    seed: int = 0,
    *,
    contender: str = "latentrt/onnxruntime-cpu/step",
    title: str = "latentrt",
    count: int = 20,
    noise: float = 0.01,
    factors: dict[str, float] | None = None,
    peak_bytes: int = 2**27,
    versions: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a record whose stages scatter by `noise` around `STAGES` times `factors`."""
    rng = np.random.default_rng(seed)
    factors = factors or {}
    samples = {
        stage: (mean * factors.get(stage, 1.0) * rng.lognormal(0, noise, count)).tolist()
        for stage, mean in STAGES.items()
    }
    samples = {"total": np.sum(list(samples.values()), axis=0).tolist(), **samples}
    row = {"operations": 1e9, "bytes": 1e7, "limit_seconds": 1e-3, "runs": 1, "seconds": 2e-3, "share_of_limit": 0.5}
    record = {
        "format": 1,
        "kind": "latency",
        "run": f"run{seed}",
        "date": "2026-01-02T03:04:05+00:00",
        "command": "latentrt bench embedded",
        "source": "abc",
        "machine": MACHINE,
        "conditions": {
            "threads": 2,
            "device": "cpu",
            "warmup": 2,
            "turns": "all contenders",
            "quiet": True,
            "others_share": 0.01,
        },
        "workload": workload("embedded").as_request(),
        "model": {
            "weights": "random",
            "bytes": 1,
            "export_seconds": 12.0,
            "export_peak_bytes": 2**30,
            "sampler": "PNDMScheduler",
        },
        "ceiling": {"flops": 1e11, "bytes": 1e10, "measured": {}},
        "contender": {"name": contender, "title": title, "versions": versions or {"numpy": "2"}, "options": {}},
        "seconds": {name: summarize(values) for name, values in samples.items()},
        "samples": samples,
        "start": {"import": 0.3, "open": 0.2, "build": None, "first_request": 0.4},
        "warmup": [0.4, 0.3],
        "launches": [count // 2, count - count // 2],
        "ratio_to_first": 1.0,
        "turns_with": [],
        "memory": {"peak_bytes": peak_bytes, "together_bytes": peak_bytes, "device_bytes": None},
        "joules": None,
        "orchestration": None,
        "roofline": {name: dict(row) for name in ("text_encoder", "denoiser", "decoder")},
    }
    return record | changes


def missing_record(seed: int = 0) -> dict[str, Any]:
    """Return the record of a contender that could not run."""
    shared = {
        k: v for k, v in latency_record(seed).items() if k in ("format", "run", "machine", "conditions", "workload")
    }
    who = {"name": "optimum", "title": "ONNX Runtime through Optimum"}
    return {**shared, "kind": "missing", "contender": who, "reason": "optimum-onnx is not installed"}


def scaling_record(axis: str = "steps") -> dict[str, Any]:
    """Return a study of one axis with linear growth."""
    made = latency_record()
    fit = {"exponent": 1.0, "error": 0.01, "factor": 0.1}
    stages = dict.fromkeys(STAGES, 0.1)
    points = [{"x": x, "seconds": 0.1 * x, "stages": stages, "peak_bytes": 2**27} for x in (1, 2, 4)]
    shared = {k: made[k] for k in ("format", "date", "command", "machine", "conditions", "workload", "contender")}
    fits = {"request": fit, "denoise": fit, "memory": None}
    conditions = {k: v for k, v in shared["conditions"].items() if k not in ("warmup", "turns")}
    return {**shared, "conditions": conditions, "kind": "scaling", "axis": axis, "points": points, "fits": fits}
