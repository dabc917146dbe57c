"""Where an error enters: one graph on a backend against unoptimized ONNX Runtime on the CPU, output of node by node.

Built on Polygraphy. Marking every tensor as an output keeps a backend from fusing across it, so this finds a layer that
is wrong, not an error that only fusion makes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.bundle import Bundle, GraphInfo
from ..engines.bundle.runs import random_inputs
from ..engines.device import Array
from ..engines.engine import Sizes
from ..engines.errors import BackendUnavailableError, EngineError, MissingExtraError, RequestError, reason
from ..engines.onnx_graph import follow_links, graph_files, load_graph
from .compare import relative_error

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
TENSORRT = "tensorrt"


@dataclass(frozen=True)
class LayerReport:
    """One tensor inside a graph: how far it is from the reference, in graph order."""

    tensor: str
    relative_error: float
    nan_count: int


def layer_errors(bundle: Bundle, graph: str, backend: str, threads: int | None = None) -> list[LayerReport]:
    """Return the error of every floating-point tensor of a graph on random inputs at a small size, in graph order.

    Raises `BackendUnavailableError` for a backend that Polygraphy cannot run, `BundleError` for an unknown graph,
    `RequestError` for one that ONNX Runtime does not compute on the CPU, or that is no network, and `EngineError` where
    it cannot be run.
    """
    info = bundle.graph(graph)
    _check(info, backend)
    files = graph_files(bundle, info, "export")
    feed = random_inputs(info, _sizes(bundle, info))
    with tempfile.TemporaryDirectory() as folder:
        marked = Path(folder) / "marked.onnx"
        order = _mark_all(files, marked)
        try:
            reference = _infer(_onnxruntime(marked, "CPUExecutionProvider", threads, optimized=False), feed)
            values = _infer(_runner(marked, backend, threads), feed)
        except Exception as error:  # the libraries' own exceptions share no base class
            raise EngineError(f"graph {graph} cannot be compared layer by layer: {reason(error)}") from error
    return [
        LayerReport(
            name,
            relative_error(values[name], reference[name]) if np.any(reference[name]) else 0.0,
            int((~np.isfinite(values[name].astype(np.float64))).sum()),
        )
        for name in order
        if name in values and np.issubdtype(reference[name].dtype, np.floating)
    ]


def _check(info: GraphInfo, backend: str) -> None:
    """Raise what can be known of a graph and a backend beforehand."""
    if backend not in (*PROVIDERS, TENSORRT):
        raise BackendUnavailableError(
            f"backend {backend} cannot be compared layer by layer: choose {', '.join((*PROVIDERS, TENSORRT))}"
        )
    if info.precision == "bf16":
        raise RequestError(
            f"graph {info.name} computes in bf16, and it is compared with onnxruntime-cpu, which cannot: give a bundle "
            "in fp32 or fp16"
        )


def _sizes(bundle: Bundle, info: GraphInfo) -> Sizes:
    """Return small sizes: two rows, two size multiples on a side, eight tokens, two steps."""
    latent = bundle.manifest.latent
    cells = 2 * latent.size_multiple // latent.downscale
    sizes = {"B": 1, "R": 2, "h": cells, "w": cells, "L": 8, "T": 2}
    if own := [letter for letter in info.letters if letter not in sizes]:
        networks = [graph.name for graph in bundle.manifest.graphs if set(graph.letters) <= sizes.keys()]
        raise RequestError(
            f"graph {info.name} is no network, with sizes of its own ({', '.join(own)}): choose {', '.join(networks)}"
        )
    return sizes


def _mark_all(files: Sequence[Path], target: Path) -> list[str]:
    """Write a graph with every tensor as an output and return the tensors in graph order."""
    try:
        from polygraphy import constants
        from polygraphy.backend.onnx import ModifyOutputs, SaveOnnx
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingExtraError("export", "comparing layer by layer") from error
    from onnx.external_data_helper import load_external_data_for_model

    G_LOGGER.module_severity = G_LOGGER.ERROR
    model = load_graph(files[0], "export")
    load_external_data_for_model(model, str(follow_links(model, files)))
    marked = ModifyOutputs(model, outputs=constants.MARK_ALL)
    saved = SaveOnnx(marked, str(target), external_data_path="marked.data", size_threshold=1 << 20)()
    return [name for node in saved.graph.node for name in node.output]


def _runner(path: Path, backend: str, threads: int | None) -> Any:
    if backend in PROVIDERS:
        return _onnxruntime(path, PROVIDERS[backend], threads, optimized=True)
    from polygraphy.backend.trt import EngineFromNetwork, NetworkFromOnnxPath, TrtRunner

    return TrtRunner(EngineFromNetwork(NetworkFromOnnxPath(str(path), strongly_typed=True)))


def _onnxruntime(path: Path, provider: str, threads: int | None, *, optimized: bool) -> Any:
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0  # 0: all
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return OnnxrtRunner(lambda: ort.InferenceSession(str(path), options, providers=[provider]))


def _infer(runner: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    with runner:
        return {name: np.array(value) for name, value in runner.infer(dict(feed)).items()}
