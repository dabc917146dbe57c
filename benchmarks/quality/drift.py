"""How far a bundle on a backend drifts from its own exact run, or from another bundle's: no checkpoint, no PyTorch.

The exact run is a whole request on ONNX Runtime, which computes in the bundle's precision. What every network reads and
writes in it is noted; the same inputs then go to the engines in question, so that a graph's line is the error that this
graph adds on a real request. The request itself is run on them as well, where errors add up. Graphs that it does not
run, or that the other bundle has cut elsewhere, are named.
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
from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Array, Stream, Tensor
from ...engines.engine import BoundEngine, Shapes
from ...engines.errors import BundleError
from ...engines.onnxruntime.cpu import OnnxRuntimeCpu
from ...engines.onnxruntime.session import OnnxRuntimeEngine
from ...engines.progress import Progress, silent
from ...export.compare import (
    Bounds,
    Report,
    TensorReport,
    compare,
    compare_requests,
    pictures_needed,
    told,
)
from ...runtime.loop.hoisted import at_one_step, of_request, picks
from ...runtime.loop.workspace import BoundGraph
from ...runtime.pipeline import Pipeline

TIMESTEP = "timestep"


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
    _check_one_model(opened, reference)
    ways, left_out = _ways(opened, reference)
    manifest, lossy = opened.manifest, dict(lossy or {})
    request = {"prompt": prompt, "num_inference_steps": steps, "seed": seed, **pictures_needed(manifest)}
    engines, bounds = open_backend(backend, **options), Bounds(manifest, reference.manifest, options=options)
    whose = "its own run" if exact is None else f"the run of {reference.path}"
    report = Report(
        bundle=str(opened.path),
        backend=engines.name,
        precision=manifest.precision,
        against=f"{whose} on {OnnxRuntimeCpu.name} in {reference.manifest.precision}",
        options=told(manifest, options | lossy),
        left_out=left_out,
    )
    noting = _Noting(options.get("threads"))
    with Pipeline(reference, noting, mode="eager", prompt_cache=0, progress=progress) as pipe:
        expected = _answer(pipe, request)
    for name, parts in ways.items():
        if runs := noting.runs.pop(name, None):
            progress(name.replace("_", " "), 0, 1)
            report.tensors += _compare_graph(opened, engines, parts, runs, bounds.error(name))
        else:
            left_out[name] = "the request does not run it"
    with Pipeline(opened, engines, progress=progress) as pipe:
        found = _answer(pipe, request | lossy)
    bound = None if lossy else bounds.psnr()
    report.request = compare_requests((found[0], expected[0]), (found[1], expected[1]), bound)
    return report


def _sound(path: str | Path) -> Bundle:
    """Open a bundle whose files are as they were exported: engines in the cache would hide that they are not."""
    bundle = Bundle.open(path)
    for name, problem in bundle.problems().items():
        raise BundleError(f"{path}: {name} {problem}: export it again")
    return bundle


def _check_one_model(opened: Bundle, reference: Bundle) -> None:
    """Raise `BundleError` where two bundles have latents, or tensors of one network, of other shapes."""
    advice = "give two bundles of one model"
    if opened.manifest.latent != reference.manifest.latent:
        raise BundleError(f"{reference.path} has latents of another shape than {opened.path}: {advice}")
    known = {(name, spec.name): spec.shape for name, g in _networks(reference).items() for spec in g.inputs + g.outputs}
    for name, graph in _networks(opened).items():
        for spec in graph.inputs + graph.outputs:
            here, there = spec.shape, known.get((name, spec.name), spec.shape)
            fixed = [(a, b) for a, b in zip(here, there, strict=False) if isinstance(a, int) and isinstance(b, int)]
            if len(here) != len(there) or any(a != b for a, b in fixed):
                raise BundleError(
                    f"{spec.name} of graph {name} is {list(there)} in {reference.path} and {list(here)} in "
                    f"{opened.path}: {advice}"
                )


def _networks(bundle: Bundle) -> dict[str, GraphInfo]:
    return {graph.name: graph for graph in bundle.manifest.graphs if graph.parity is not None}


def _ways(opened: Bundle, reference: Bundle) -> tuple[dict[str, list[GraphInfo]], dict[str, str]]:
    """Return what computes each network's outputs from what is noted of the reference's, and why the others have none.

    That is the graph itself, or a denoiser behind its parts, where the other bundle has it whole.
    """
    noted, manifest = _networks(reference), opened.manifest
    before = [*of_request(manifest), *picks(manifest)]
    ways, left = dict[str, list[GraphInfo]](), dict[str, str]()
    for name, graph in _networks(opened).items():
        if name not in noted:
            left[name] = f"{reference.path} has none"
        elif possible := [way for way in ([graph], [*before, graph]) if _computes(way, noted[name])]:
            ways[name] = possible[0]
        else:
            left[name] = f"it reads other tensors in {reference.path}"
    apart = {part.name for way in ways.values() for part in way}
    return ways, {name: why for name, why in left.items() if name not in apart}


def _computes(way: Sequence[GraphInfo], noted: GraphInfo) -> bool:
    """Tell whether graphs that run one after the other give a noted graph's outputs from its inputs."""
    there = {spec.name for spec in noted.inputs}
    if TIMESTEP in there:
        there |= at_one_step(np.zeros(1, np.float32)).keys()
    for part in way:
        if not {spec.name for spec in part.inputs} <= there:
            return False
        there |= {spec.name for spec in part.outputs}
    return {spec.name for spec in way[-1].outputs} == {spec.name for spec in noted.outputs}


def _answer(pipe: Pipeline, request: Mapping[str, Any]) -> tuple[list[Array], Array]:
    """Return the latents after every step and the pictures [B, H, W, 3] of a request."""
    latents: list[Array] = []

    def keep(_: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        latents.append(values["latents"])

    result = pipe(**request, callback_on_step_end=keep)
    return latents, np.stack([np.asarray(image) for image in result.images])


def _compare_graph(
    bundle: Bundle, backend: Backend, way: Sequence[GraphInfo], runs: Sequence[_Run], bound: float
) -> list[TensorReport]:
    """Run a graph, behind its parts, on what was noted of it, and return how far its outputs are, over all runs."""
    held = [{**(at_one_step(run.inputs[TIMESTEP]) if way[1:] else {}), **run.inputs} for run in runs]
    for part in way:
        _run_on(bundle, backend, part, held)
    return [
        compare(
            f"{way[-1].name}.{spec.name}",
            np.stack([values[spec.name] for values in held]),
            np.stack([run.outputs[spec.name] for run in runs]),
            bound,
        )
        for spec in way[-1].outputs
    ]


def _run_on(bundle: Bundle, backend: Backend, graph: GraphInfo, held: Sequence[dict[str, Array]]) -> None:
    """Run a graph on several sets of tensors by name, and put its outputs beside them."""
    inputs = [{spec.name: values[spec.name].astype(spec.dtype, copy=False) for spec in graph.inputs} for values in held]
    with ExitStack() as memory:
        stream = memory.enter_context(closing(backend.device.stream()))
        engine = backend.open(bundle, graph, {name: array.shape for name, array in inputs[0].items()})
        memory.callback(engine.close)
        bound_graph = memory.enter_context(closing(BoundGraph(backend.device, engine, graph, inputs[0])))
        for values, arrays in zip(held, inputs, strict=True):
            values |= bound_graph.run(arrays, stream)
