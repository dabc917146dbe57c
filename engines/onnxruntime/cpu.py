"""ONNX Runtime on the CPU: graphs optimized once for this processor, kept in the engine cache, memory-mapped at open.

Opening a full-size U-Net from its ONNX file takes ten seconds and a second copy of the weights; the optimized graph
with its weights in a separate file opens in under a second and shares the page cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attention import rewrite
from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..device import Stream, Tensor
from ..engine import Shapes
from ..errors import BackendUnavailableError, EngineError, reason
from ..host import HostDevice, HostStream
from ..machine import processor_identity
from ..onnx_graph import follow_links, graph_files, load_graph
from ..options import Threads, threads_of
from ..selfcheck import Place, accept, out_of_memory
from .session import OnnxRuntimeEngine

BUILDER = 2
"""Raised when what `_build` does to a graph changes, so that engines built before are not reused."""

log = logging.getLogger(__name__)


def unavailable_reason() -> str | None:
    """Return why this backend cannot run here, or None when it can."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return "onnxruntime is not installed: run `pip install 'latentrt[cpu]'`"
    return None


class OnnxRuntimeCpu:
    """Opens bundle graphs with ONNX Runtime's CPU provider."""

    name = "onnxruntime-cpu"
    dynamic = True
    compiles_shapes = False
    can_capture = True

    def __init__(
        self,
        *,
        cache: EngineCache | None = None,
        threads: Threads = None,
    ) -> None:
        """Open the processor; raises `BackendUnavailableError` without ONNX Runtime, `RequestError` for bad options."""
        self.threads = threads_of(threads)
        if reason := unavailable_reason():
            raise BackendUnavailableError(f"backend {self.name}: {reason}")
        self.device = HostDevice()
        self.lock = threading.RLock()
        self._cache = cache or EngineCache()

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Build nothing, as one engine serves every shape; raises `EngineError` for graphs that cannot run here."""
        for name in shapes:
            _check_precision(bundle.graph(name))

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OnnxRuntimeEngine:
        """Open one graph of a bundle, building its engine first when the cache has none, and check a new engine."""
        _check_precision(graph)
        folder, session = self._loaded(bundle, graph)
        engine = OnnxRuntimeEngine(graph, session, OnnxRuntimeBinding, bundle.nbytes(graph))
        with self.lock:
            accept(engine, bundle, graph, Place(self.name, self.device, {}, folder))
        return engine

    def _loaded(self, bundle: Bundle, graph: GraphInfo) -> tuple[Path, Any]:
        """Return an engine's folder and session."""
        return self._cache.load(
            lambda: self._built(bundle, graph),
            lambda folder: self._session(folder, graph),
            lambda: out_of_memory(self.name, f"engine {graph.name} was loaded"),
            "install another version of onnxruntime, and report it",
        )

    def _built(self, bundle: Bundle, graph: GraphInfo) -> Path:
        return self._cache.get(graph.name, self.key(bundle, graph), lambda out: self._build(bundle, graph, out))

    def key(self, bundle: Bundle, graph: GraphInfo) -> dict[str, Any]:
        """Return everything that changes an engine of this backend."""
        import onnxruntime

        return {
            "backend": self.name,
            "builder": BUILDER,
            "graph": bundle.digest(graph),
            "onnxruntime": onnxruntime.__version__,
            "cpu": processor_identity(),
        }

    def _build(self, bundle: Bundle, graph: GraphInfo, out: Path) -> dict[str, Any]:
        import onnxruntime as ort

        model, weights = _graph_for_cpu(graph_files(bundle, graph, "cpu"))
        options = self._options()
        if graph.quantization is not None:
            # Computed as written, in float32 between the marks: ONNX Runtime 1.31 fuses fp8 into kernels of int8, which
            # it then refuses, fails on int8 with marks that it has moved, and is slower with its kernels of int8.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(out / "model.onnx")
        for entry, value in {
            "session.optimized_model_external_initializers_file_name": "model.onnx.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.model_external_initializers_file_folder_path": str(weights),
            "session.disable_prepacking": "1",
        }.items():
            options.add_session_config_entry(entry, value)
        log.info("building %s for %s", graph.name, self.name)
        try:
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise EngineError(f"graph {graph.name} cannot be built for {self.name}: {reason(error)}") from error
        return {"tensors": [t.model_dump() for t in graph.inputs + graph.outputs]}

    def _options(self) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # every failure is raised, with its text
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Every session has its own threads. Those of the last graph would spin on while the next graph runs: on two
        # cores that cost a fifth of a request and doubled the decoder's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _session(self, folder: Path, graph: GraphInfo) -> Any:
        import onnxruntime as ort

        path = folder / "model.onnx"
        options = self._options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        if graph.stage == "step" and graph.parity is None:  # of no module: it updates latents
            options.intra_op_num_threads = 1  # a few small element-wise nodes: waking a second thread costs more
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"engine {path} cannot be loaded ({reason(error)})") from error


class OnnxRuntimeBinding:
    """Fixed addresses for one session."""

    def __init__(self, engine: OnnxRuntimeEngine, tensors: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._tensors = dict(tensors)  # keeps the memory alive
        self._addresses = engine.addresses(tensors, "cpu")

    def enqueue(self, stream: Stream) -> None:
        """Run now, or record the run when the stream captures."""
        assert isinstance(stream, HostStream)
        stream.submit(self._run)

    def _run(self) -> None:
        self._engine.run(self._addresses)


def _check_precision(graph: GraphInfo) -> None:
    """Raise `EngineError` for a graph in a number format that ONNX Runtime has no CPU kernels for."""
    if graph.precision == "bf16":
        raise EngineError(
            f"graph {graph.name} computes in bf16, which onnxruntime-cpu cannot: export the checkpoint in fp32, "
            "or use tensorrt, tensorrt-rtx or onnxruntime-cuda"
        )


def _graph_for_cpu(files: Sequence[Path]) -> tuple[bytes, Path]:
    """Return a graph as ONNX Runtime's CPU provider likes it, and the folder of its weights."""
    model = load_graph(files[0], "cpu")
    rewrite(model, fuse=True)
    folder = follow_links(model, files)
    return model.SerializeToString(), folder
