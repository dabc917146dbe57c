"""The way of one bundle: draw, calibrate, sweep, write, measure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...engines.backends import Backend, open_backend
from ...engines.bundle import (
    Bundle,
    EightBits,
    GraphInfo,
    Manifest,
    atomic_folder,
    describe_files,
    write_manifest,
)
from ...engines.errors import ExportError, RequestError
from ...engines.onnx_graph import graph_files, load_graph
from ...engines.progress import Progress
from ...runtime.loop.workspace import run_once
from ..compare import psnr
from .environment import checked, environment
from .layers import borders, layers_of, name_nodes, named
from .marked import Marked, error_of
from .record import DENOISER, PROMPTS, Recording, record

MOST_STEPS = 20
"""Steps of a run by default, where the bundle has more."""

CALLS = 4
"""Calls of the network that each prompt gives."""

LOST = 0.5
"""Relative error of the finished denoiser above which it is not kept."""


def quantize(
    bundle: str | Path,
    out: Path,
    precision: EightBits,
    *,
    prompts: Sequence[str] | None,
    keep: Sequence[str],
    steps: int | None,
    seed: int,
    tries: int,
    python: str | Path | None,
    threads: int | None,
    replace: bool,
    progress: Progress,
) -> Path:
    """Quantize a bundle; see `latentrt.export.quantize.quantize_bundle`."""
    opened = Bundle.open(bundle)
    graph = _denoiser(opened)
    chosen = list(PROMPTS if prompts is None else prompts)
    if len(chosen) < 2:
        raise RequestError(f"{len(chosen)} prompts are given: give 2 or more, as some calibrate and others measure")
    if steps is not None and steps < 1:
        raise RequestError(f"steps is {steps}: give 1 or more, or leave it out")
    if tries < 0:
        raise RequestError(f"tries is {tries}: give 0 or more")
    steps = steps or min(opened.manifest.default_num_inference_steps, MOST_STEPS)
    model = load_graph(graph_files(opened, graph, "cpu")[0], "cpu")
    name_nodes(model.graph)
    layers = layers_of(model.graph)
    kept = borders(model.graph, layers) | named(layers, keep)
    backend = open_backend("onnxruntime-cpu", threads=threads)
    with atomic_folder(out, replace=replace) as folder:
        interpreter = environment(progress) if python is None else checked(Path(python))
        recordings = record(opened, backend, chosen, steps=steps, calls=CALLS, seed=seed, progress=progress)
        held = range(len(chosen))[3::4] or range(len(chosen))[-1:]
        with TemporaryDirectory(dir=folder, prefix="work-") as work:
            marked = Marked(opened, graph, model, Path(work))
            calibrating = [recording for number, recording in enumerate(recordings) if number not in held]
            info = marked.quantized(folder, interpreter, precision, layers, kept, calibrating, tries, progress)
        manifest = _copied(opened, graph, info, folder)
        write_manifest(folder, manifest)
        known = [(chosen[number], seed + number, recordings[number]) for number in held]
        assert info.quantization is not None
        lost = info.quantization.model_copy(update=_measured(Bundle.open(folder), backend, known, steps, progress))
        write_manifest(folder, _with(manifest, info.model_copy(update={"quantization": lost})))
    return out


def _denoiser(bundle: Bundle) -> GraphInfo:
    """Return the graph to quantize; raises `RequestError` for a bundle that this cannot be done with."""
    graph = bundle.graph(DENOISER)
    if graph.quantization is not None:
        raise RequestError(
            f"bundle {bundle.path} is in {graph.quantization.precision} already: give the one that it was made from"
        )
    if graph.precision == "bf16":
        raise RequestError(
            f"bundle {bundle.path} computes in bf16, which is not calibrated on a CPU: export it in fp32 or fp16"
        )
    if graph.winograd:
        raise RequestError(
            f"bundle {bundle.path} was exported with winograd, whose sums 8 bits do not hold: give one without"
        )
    if bundle.manifest.masked_input is not None:
        raise RequestError(f"bundle {bundle.path} repaints pictures, and calibration draws from prompts alone")
    return graph


def _measured(
    bundle: Bundle, backend: Backend, held: Sequence[tuple[str, int, Recording]], steps: int, progress: Progress
) -> dict[str, float | None]:
    """Return what is lost on recordings of the bundle before, each with its prompt and seed.

    Raises `ExportError` where that is too much.
    """
    progress("measuring", 0, 2)
    graph, stream = bundle.graph(DENOISER), backend.device.stream()
    calls = [call for _, _, recording in held for call in recording.calls]
    engine = backend.open(bundle, graph)
    try:
        inputs = [{spec.name: call[spec.name] for spec in graph.inputs} for call in calls]
        error = error_of(
            (run_once(backend.device, engine, graph, each, stream), call)
            for each, call in zip(inputs, calls, strict=True)
        )
    finally:
        engine.close()
        stream.close()
    if not error <= LOST:
        raise ExportError(
            f"the quantized denoiser is off by {error:.2g} of its output, where {LOST:g} is allowed: keep more layers "
            "with --keep, give prompts that are like those to be drawn, or take another precision"
        )
    pictures = [
        record(bundle, backend, [prompt], steps=steps, calls=1, seed=seed, progress=progress)[0].picture
        for prompt, seed, _ in held
    ]
    return {"relative_error": error, "psnr": psnr(np.stack(pictures), np.stack([each.picture for *_, each in held]))}


def _copied(bundle: Bundle, graph: GraphInfo, info: GraphInfo, folder: Path) -> Manifest:
    """Put the files of all other graphs and tokenizers beside a graph's new ones and return the manifest of them all.

    They are the same files where the disk can have two names for one, else copies.
    """
    manifest, own = bundle.manifest, {*graph.files, *(reference.file for reference in graph.references)}
    others = {name: known for name, known in manifest.files.items() if name not in own}
    files = others | describe_files(folder)
    for name in others:
        source, target = bundle.file(name).resolve(), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # on another file system, or somebody else's
            shutil.copyfile(source, target)
    assert info.quantization is not None
    tool, _, version = info.quantization.tool.partition(" ")
    return _with(manifest, info, files=files, tools=manifest.tools | {tool: version})


def _with(manifest: Manifest, graph: GraphInfo, **others: Any) -> Manifest:
    """Return a manifest with this graph in place of the one of its name."""
    graphs = tuple(graph if each.name == graph.name else each for each in manifest.graphs)
    return manifest.model_copy(update={"graphs": graphs, **others})
