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

from ..engines.bundle import Bundle, GraphInfo, LatentInfo
from ..engines.device import Array
from ..engines.engine import shape_of
from ..engines.errors import BackendUnavailableError, MissingExtraError
from ..engines.onnx_graph import follow_links, graph_files, load_graph
from .compare import relative_error

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class LayerReport:
    """One tensor inside a graph: how far it is from the reference, in graph order."""

    tensor: str
    relative_error: float
    nan_count: int


def layer_errors(bundle: Bundle, graph: str, backend: str, seed: int = 0) -> list[LayerReport]:
    """Return the error of every floating-point tensor of a graph on random inputs at a small size, in graph order.

    Raises `BackendUnavailableError` for a backend that Polygraphy cannot run, `BundleError` for an unknown graph.
    """
    info = bundle.graph(graph)
    files = graph_files(bundle, info, "export")
    feed = random_feed(info, bundle.manifest.latent, seed)
    with tempfile.TemporaryDirectory() as folder:
        marked = Path(folder) / "marked.onnx"
        order = _mark_all(files, marked)
        reference = _infer(_onnxruntime(marked, "CPUExecutionProvider", optimized=False), feed)
        values = _infer(_runner(marked, backend), feed)
    return [
        LayerReport(
            name,
            relative_error(values[name], reference[name]) if np.any(reference[name]) else 0.0,
            int((~np.isfinite(values[name].astype(np.float64))).sum()),
        )
        for name in order
        if name in values and np.issubdtype(reference[name].dtype, np.floating)
    ]


def random_feed(info: GraphInfo, latent: LatentInfo, seed: int) -> dict[str, Array]:
    """Return random inputs for a graph: two rows, two size multiples on a side, eight tokens; ids, times in range."""
    cells = 2 * latent.size_multiple // latent.downscale
    sizes = {"B": 1, "R": 2, "h": cells, "w": cells, "L": 8}
    generator = np.random.default_rng(seed)
    feed: dict[str, Array] = {}
    for spec in info.inputs:
        shape = shape_of(spec, sizes)
        if spec.dtype in ("int64", "uint8"):
            feed[spec.name] = generator.integers(0, 256, shape).astype(spec.dtype)
        elif spec.name == "timestep":
            feed[spec.name] = generator.uniform(0, 999, shape).astype(spec.dtype)
        else:
            feed[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    return feed


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


def _runner(path: Path, backend: str) -> Any:
    if backend in PROVIDERS:
        return _onnxruntime(path, PROVIDERS[backend], optimized=True)
    if backend == "tensorrt":
        from polygraphy.backend.trt import EngineFromNetwork, NetworkFromOnnxPath, TrtRunner

        return TrtRunner(EngineFromNetwork(NetworkFromOnnxPath(str(path), strongly_typed=True)))
    raise BackendUnavailableError(f"backend {backend} cannot be compared layer by layer: choose {', '.join(PROVIDERS)}")


def _onnxruntime(path: Path, provider: str, *, optimized: bool) -> Any:
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return OnnxrtRunner(lambda: ort.InferenceSession(str(path), options, providers=[provider]))


def _infer(runner: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    with runner:
        return {name: np.array(value) for name, value in runner.infer(dict(feed)).items()}
