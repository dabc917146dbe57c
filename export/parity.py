"""The check that every exported graph passes before it is committed: the same numbers as its PyTorch module.

What the module gives for a few rows goes into the bundle, so that every engine can be checked in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from ..engines.bundle import Parity, Precision
from ..engines.errors import ExportError, reason
from .checkpoints.streamed import filled
from .compare import EXPORT_BOUND, TensorReport, compare
from .graph import Graph, split_size

CHECK_SIZES = (((1, 16, 8), 2), ((4, 9, 13), 1))
"""Batch, latent height and latent width of the two checks, and how many times the usual tokens: even and odd, none as
in the trace, quick to compute."""

ROWS = 2
"""Rows of a graph that a bundle records: two, so that rows that are mixed up are found."""
LARGE_ROW = 1 << 20
"""Bytes of a row, all its inputs and outputs, above which one is recorded: a picture with its pixels in float32."""

Case = tuple[dict[str, torch.Tensor], list[np.ndarray]]
Run = Callable[[Sequence[Mapping[str, np.ndarray]]], list[list[np.ndarray]]]
"""Computes what an exported graph gives for inputs by name."""


def reference_cases(graph: Graph) -> list[Case]:
    """Return random inputs and the float32 module's outputs for them."""
    return [_case(graph, graph.sizes(*sizes), seed) for seed, sizes in enumerate(CHECK_SIZES, start=1)]


def native_case(graph: Graph, cells: tuple[int, int]) -> Case | None:
    """Return a case at the latent height and width that most engines are for; None for a graph of no such sizes."""
    if not {"h", "w"} <= set(graph.symbols):
        return None
    value = {"h": cells[0], "w": cells[1], **graph.usual}
    sizes = [value.get(letter, 1) for letter in graph.symbols]
    row = sum(
        math.prod(factor * value.get(letter, 1) for factor, letter in map(split_size, spec.shape))
        * np.dtype(spec.dtype).itemsize
        for spec in graph.inputs + graph.outputs
    )
    return _case(graph, [1 if row > LARGE_ROW else ROWS, *sizes[1:]], seed=len(CHECK_SIZES) + 1)


@torch.no_grad()
def _case(graph: Graph, sizes: Iterable[int], seed: int) -> Case:
    inputs = graph.random_inputs(sizes, seed)
    with filled(graph.module):
        outputs = graph.module(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return inputs, [output.numpy() for output in outputs]


def check_parity(name: str, run: Run, cases: Sequence[Case], precision: Precision) -> Parity:
    """Run an exported graph on the CPU and return how far it is from its module; a byte may be off by one.

    Raises `ExportError` beyond `EXPORT_BOUND`, also when either side is not finite.
    """
    bound = EXPORT_BOUND[precision]
    worst = TensorReport(name, 0.0, 0.0, 1.0, 0, bound)
    arrays = [{key: value.numpy() for key, value in inputs.items()} for inputs, _ in cases]
    try:
        found_outputs = run(arrays)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ExportError(f"graph {name} does not run on the CPU, to be checked ({reason(error)})") from error
    for (_, references), outputs in zip(cases, found_outputs, strict=True):
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
