"""Every new engine reproduces reference rows before it is used: builders have miscompiled without a word."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle, GraphInfo, Precision
from .bundle.runs import Ranges, Run, batch_symbol, repeated, runs
from .cache import SIDECAR
from .device import Array, Device
from .engine import Engine, shape_of
from .errors import EngineError, is_out_of_memory
from .files import write_note

PASSED = "selfcheck.json"
"""The checks that an engine of the cache has passed, by device and reference rows."""
CHECK = 1
"""Raised when the check changes, so that engines that passed an earlier one are checked again."""

BOUND: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
"""Largest relative error of an engine, which may sum in another order and fuse. TF32 keeps as many bits as fp16.

bf16 keeps 8 bits where fp16 keeps 11, so its errors are 8 times as large; a bound of 8 times fp16's would let through
outputs that are a quarter wrong.
"""

QUANTIZED_BOUND = 0.25
"""The same of a graph with layers in 8 bits: a sum that comes out otherwise in its last bit may be rounded to the next
of 256 numbers, so that two right engines differ about as much as each of them from the graph before. Stable Diffusion
1.5's U-Net with random weights differs by 13 % in fp8 from itself with nodes fused; what is wrong differs by 100 %."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a loaded engine runs, and for which shapes."""

    backend: str
    device: Device
    facts: Mapping[str, str]
    """What tells one device from another: an engine that has passed on one is checked again on the next."""
    folder: Path | None
    """The engine in the cache; None when it is not kept."""
    ranges: Ranges | None = None
    """None for an engine that takes every shape."""
    tf32: bool = False
    computes: Precision = "fp32"
    """What the engine computes in where that is less than the graph says."""

    def bound(self, graph: GraphInfo) -> float:
        """Return the largest relative error that an engine of a graph may have."""
        bound = max(BOUND[graph.precision or "fp32"], BOUND[self.computes])
        if graph.quantization is not None:
            bound = max(bound, QUANTIZED_BOUND)
        return max(bound, BOUND["fp16"]) if self.tf32 else bound


def accept(engine: Engine, bundle: Bundle, graph: GraphInfo, place: Place) -> None:
    """Check a loaded engine unless it has passed already, and note beside it that it passed.

    An engine that does not pass is closed. Raises `EngineError` when it is wrong or memory runs out, and `BundleError`
    when the reference rows are damaged.
    """
    identity, passed = _identity(bundle, graph, place), _passed(place.folder)
    if identity in passed:
        return
    try:
        error = _check(engine, bundle, graph, place)
    except BaseException:
        engine.close()
        raise
    log.info("engine %s on %s has passed its check: relative error %.2g", graph.name, place.backend, error)
    if place.folder is not None:
        facts = {"graph": graph.name, **place.facts, "relative_error": error, "bound": place.bound(graph)}
        text = json.dumps({**passed, identity: facts}, indent=2) + "\n"
        write_note(place.folder / PASSED, text.encode())  # a cache that cannot be written: checked at each start


def out_of_memory(backend: str, what: str) -> EngineError:
    """Return the error of something that memory ran out in, with what needs less."""
    streaming = ", --option weights_on_gpu=0" if backend.startswith("tensorrt") else ""
    return EngineError(
        f"out of memory on {backend} while {what}: use --low-memory, a smaller size or batch"
        f"{streaming}, or stop other programs"
    )


@np.errstate(invalid="ignore", over="ignore")  # infinities give NaN, which no bound accepts
def relative_error(values: Array, reference: Array) -> float:
    """Return the root-mean-square of the difference over the root-mean-square of the reference.

    Bytes are compared as parts of 255 and may be off by one: a value at a rounding edge may fall on either side.
    """
    b = reference.astype(np.float64)
    difference = np.abs(values.astype(np.float64) - b)
    if reference.dtype == np.uint8:
        difference, b = np.maximum(difference - 1, 0) / 255, b / 255
    return float(_rms(difference) / max(_rms(b), 1e-12))


def _check(engine: Engine, bundle: Bundle, graph: GraphInfo, place: Place) -> float:
    """Run an engine on all that it must reproduce and return its largest relative error."""
    worst, rows, problem = 0.0, dict[str, Array](), None
    try:
        for run in runs(bundle, graph, place.ranges):
            worst = max(worst, _compare(_outputs(engine, graph, place.device, run), graph, place, run, rows))
    except (EngineError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = out_of_memory(place.backend, f"engine {graph.name} was checked")
    if problem is not None:  # raised here, where no frame of the failure holds memory any more
        raise problem
    return worst


def _outputs(engine: Engine, graph: GraphInfo, device: Device, run: Run) -> dict[str, Array]:
    """Run an engine on host arrays; nothing stays allocated."""
    with ExitStack() as memory:
        stream = device.stream()
        memory.callback(stream.close)
        tensors = {}
        for spec in graph.inputs + graph.outputs:
            tensors[spec.name] = tensor = device.empty(shape_of(spec, run.sizes), spec.dtype)
            memory.callback(tensor.close)
        for name, array in run.inputs.items():
            tensors[name].write(array, stream)
        bound = engine.bind(tensors)  # lives until its work is done
        bound.enqueue(stream)
        return {spec.name: tensors[spec.name].read(stream) for spec in graph.outputs}


def _compare(outputs: Mapping[str, Array], graph: GraphInfo, place: Place, run: Run, rows: dict[str, Array]) -> float:
    """Return the largest relative error of a run; `rows` holds what runs without a reference gave for their row."""
    worst, bound, symbol = 0.0, place.bound(graph), batch_symbol(graph)
    for spec in graph.outputs:
        values, origin = outputs[spec.name], run.origin
        if not np.isfinite(values).all():
            raise _wrong(graph, place, run, f"{spec.name} is not finite", float("nan"))
        if run.expected:
            expected = run.expected[spec.name]
        elif symbol and spec.shape[:1] == (symbol,):
            expected, origin = repeated(rows.setdefault(spec.name, values[:1]), len(values)), "a row of the same inputs"
        else:
            continue
        error = relative_error(values, expected)
        if not error <= bound:
            raise _wrong(graph, place, run, f"{spec.name} differs from {origin}", error)
        worst = max(worst, error)
    return worst


def _wrong(graph: GraphInfo, place: Place, run: Run, what: str, error: float) -> EngineError:
    at = " ".join(f"{name}={size}" for name, size in run.sizes.items())
    return EngineError(
        f"engine {graph.name} of backend {place.backend} is wrong and was not used: {what} at {at or 'its only size'}, "
        f"relative error {error:.2g} where {place.bound(graph):g} is allowed; use another backend, version or option "
        "of it, or an export in fp32, and report it"
    )


def _identity(bundle: Bundle, graph: GraphInfo, place: Place) -> str:
    """Return one hash over what a check is about: the engine's files, the device, the rows, and the check itself."""
    sidecar = b""
    if place.folder is not None:
        with suppress(OSError):
            sidecar = (place.folder / SIDECAR).read_bytes()
    rows = [bundle.manifest.files[reference.file].sha256 for reference in graph.references]
    about = [CHECK, hashlib.sha256(sidecar).hexdigest(), graph.name, dict(place.facts), place.bound(graph), rows]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _passed(folder: Path | None) -> dict[str, Any]:
    """Return the checks that are noted beside an engine."""
    if folder is not None:
        with suppress(OSError, ValueError, RecursionError):
            passed = json.loads((folder / PASSED).read_text(encoding="utf-8"))
            if isinstance(passed, dict):
                return passed
    return {}


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
