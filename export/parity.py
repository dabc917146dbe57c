"""The check that every exported graph passes before it is committed: the same numbers as its PyTorch module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from ..engines.bundle import Parity, Precision
from ..engines.errors import ExportError
from .compare import EXPORT_BOUND, TensorReport, compare
from .graph import Graph

CHECK_SIZES = ((1, 16, 8), (4, 9, 13))
"""Batch, latent height and latent width of the two checks: even and odd, none as in the trace, quick to compute."""

Case = tuple[dict[str, torch.Tensor], list[np.ndarray]]


@torch.no_grad()
def reference_cases(graph: Graph) -> list[Case]:
    """Return random inputs and the float32 module's outputs for them."""
    cases = []
    for seed, sizes in enumerate(CHECK_SIZES, start=1):
        inputs = graph.random_inputs(sizes[: len(graph.symbols)], seed)
        outputs = graph.module(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cases.append((inputs, [output.numpy() for output in outputs]))
    return cases


def check_parity(name: str, file: Path, cases: Sequence[Case], precision: Precision) -> Parity:
    """Run an exported graph on the CPU and return how far it is from its module; a byte may be off by one.

    Raises `ExportError` beyond `EXPORT_BOUND`, also when either side is not finite.
    """
    session, bound = _session(file), EXPORT_BOUND[precision]
    worst = TensorReport(name, 0.0, 0.0, 1.0, 0, bound)
    for inputs, references in cases:
        outputs = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for output, reference in zip(outputs, references, strict=True):
            if output.shape != reference.shape:
                raise ExportError(f"graph {name} gives shape {output.shape} where its module gives {reference.shape}")
            found = compare(name, output, reference, bound)
            if not found.within:
                hint = "; the checkpoint may overflow half precision, try fp32" if precision == "fp16" else ""
                raise ExportError(
                    f"graph {name} differs from its PyTorch module by {found.relative_error:.2g} (relative) "
                    f"where {bound:g} is allowed for {precision}{hint}"
                )
            worst = max(worst, found, key=lambda report: report.relative_error)
    return Parity(max_abs_error=worst.max_abs_error, relative_error=worst.relative_error)


def _session(file: Path) -> Any:
    """Open a graph without optimizations and without repacking its weights, so that they stay memory-mapped."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
