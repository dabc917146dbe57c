"""How far a bundle on a backend drifts from its own exact run, or from another bundle's: no checkpoint, no PyTorch.

The exact run is a whole request on ONNX Runtime, which computes in the bundle's precision. What every network reads and
writes in it is noted; the same inputs then go to the engines in question, so that a graph's line is the error that this
graph adds on a real request. The request itself is run on them as well, where errors add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.backends import Backend, open_backend
from ...engines.bundle import Bundle, GraphInfo, Precision
from ...engines.device import Array, Stream, Tensor
from ...engines.engine import BoundEngine, Shapes
from ...engines.errors import BundleError, RequestError
from ...engines.onnxruntime.cpu import OnnxRuntimeCpu
from ...engines.onnxruntime.session import OnnxRuntimeEngine
from ...engines.progress import Progress, silent
from ...engines.selfcheck import BOUND
from ...export.compare import (
    PSNR_BOUND,
    Report,
    TensorReport,
    compare,
    compare_requests,
    pictures_needed,
)
from ...runtime.loop.workspace import BoundGraph
from ...runtime.pipeline import Pipeline


@dataclass(frozen=True)
class _Run:
    """What a network read and wrote in one of its runs, by name."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]


class _Noting(OnnxRuntimeCpu):
    """ONNX Runtime, whose engines of networks note every run."""

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads=threads)
        self.runs: dict[str, list[_Run]] = defaultdict(list)

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OnnxRuntimeEngine:
        engine = super().open(bundle, graph, shapes)
        if graph.parity is not None:
            bind = engine.bind
            engine.bind = lambda tensors: _Noted(bind(tensors), graph, tensors, self.runs[graph.name])  # type: ignore[method-assign]
        return engine


@dataclass(frozen=True)
class _Noted:
    bound: BoundEngine
    graph: GraphInfo
    tensors: Mapping[str, Tensor]
    runs: list[_Run]

    def enqueue(self, stream: Stream) -> None:
        inputs = {spec.name: self.tensors[spec.name].read(stream) for spec in self.graph.inputs}
        self.bound.enqueue(stream)
        self.runs.append(_Run(inputs, {spec.name: self.tensors[spec.name].read(stream) for spec in self.graph.outputs}))


def drift(
    bundle: str | Path,
    *,
    exact: str | Path | None = None,
    backend: str = "auto",
    prompt: str = "a photo of an astronaut riding a horse",
    steps: int = 10,
    seed: int = 0,
    lossy: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Report:
    """Compare a bundle on a backend with its own exact run, or with that of the bundle `exact`, at its default size.

    `lossy` are arguments of the request that only the compared run has, such as `forecast="taylor"`, and `options` go
    to the backend. Raises `BundleError` where a bundle is damaged or the two do not belong together,
    and what opening and running a pipeline raises.
    """
    opened = _sound(bundle)
    reference = opened if exact is None else _sound(exact)
    manifest, lossy = opened.manifest, dict(lossy or {})
    if manifest.latent != reference.manifest.latent:
        raise BundleError(f"{exact} has latents of another shape than {bundle}: give two bundles of one model")
    request = {"prompt": prompt, "num_inference_steps": steps, "seed": seed, **pictures_needed(manifest)}
    engines = open_backend(backend, **options)
    inside = _inside(manifest.precision, options)
    whose = "its own run" if exact is None else f"the run of {reference.path}"
    report = Report(
        bundle=str(opened.path),
        backend=engines.name,
        precision=manifest.precision,
        against=f"{whose} on {OnnxRuntimeCpu.name} in {reference.manifest.precision}",
        options={name: value for name, value in (options | lossy).items() if name != "threads"},
    )
    noting = _Noting(options.get("threads"))
    with Pipeline(reference, noting, mode="eager", prompt_cache=0, progress=progress) as pipe:
        expected = _answer(pipe, request)
    for graph in manifest.graphs:
        if runs := noting.runs.pop(graph.name, None):
            progress(graph.name.replace("_", " "), 0, 1)
            report.tensors += _compare_graph(opened, engines, graph, runs, BOUND[inside])
    with Pipeline(opened, engines, progress=progress) as pipe:
        found = _answer(pipe, request | lossy)
    bound = None if lossy else PSNR_BOUND[inside]
    report.request = compare_requests((found[0], expected[0]), (found[1], expected[1]), bound)
    return report


def _sound(path: str | Path) -> Bundle:
    """Open a bundle whose files are as they were exported: engines in the cache would hide that they are not."""
    bundle = Bundle.open(path)
    for name, problem in bundle.problems().items():
        raise BundleError(f"{path}: {name} {problem}: export it again")
    return bundle


def _inside(precision: Precision, options: Mapping[str, Any]) -> Precision:
    """Return the coarsest precision that a bundle or a backend's options ask for, whose bounds hold."""
    named: dict[Any, Precision] = {"bf16": "bf16", "f16": "fp16"}
    asked = named.get(options.get("precision"), "fp16" if options.get("tf32") else "fp32")
    return max((precision, asked), key=lambda each: BOUND[each])


def _answer(pipe: Pipeline, request: Mapping[str, Any]) -> tuple[list[Array], Array]:
    """Return the latents after every step and the pictures [B, H, W, 3] of a request."""
    latents: list[Array] = []

    def keep(_: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        latents.append(values["latents"])

    result = pipe(**request, callback_on_step_end=keep)
    return latents, np.stack([np.asarray(image) for image in result.images])


def _compare_graph(
    bundle: Bundle, backend: Backend, graph: GraphInfo, runs: Sequence[_Run], bound: float
) -> list[TensorReport]:
    """Run a graph on what was noted of it, and return how far each of its outputs is, over all runs."""
    with ExitStack() as memory:
        stream = memory.enter_context(closing(backend.device.stream()))
        inputs = [{spec.name: _as(run.inputs, spec.name, spec.dtype) for spec in graph.inputs} for run in runs]
        engine = backend.open(bundle, graph, {name: array.shape for name, array in inputs[0].items()})
        memory.callback(engine.close)
        bound_graph = memory.enter_context(closing(BoundGraph(backend.device, engine, graph, inputs[0])))
        found = [bound_graph.run(arrays, stream) for arrays in inputs]
    together = [
        (spec.name, np.stack([each[spec.name] for each in found]), np.stack([run.outputs[spec.name] for run in runs]))
        for spec in graph.outputs
    ]
    return [compare(f"{graph.name}.{name}", ours, theirs, bound) for name, ours, theirs in together]


def _as(arrays: Mapping[str, Array], name: str, dtype: str) -> Array:
    if name not in arrays:
        raise RequestError(f"the exact run has no tensor {name!r}: give two bundles of one model")
    return arrays[name].astype(dtype, copy=False)
