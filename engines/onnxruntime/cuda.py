"""ONNX Runtime on an NVIDIA GPU, on our memory and stream, nothing waiting in a run.

Sessions run on one stream of the backend's own, which is fixed when a session is made; each run is chained behind the
caller's stream and the caller's behind it, so any stream may be given. Runs cannot be captured with `Stream.capture`:
releases up to 1.31 free host buffers in a way that a capture forbids, and end the process. ONNX Runtime can capture and
replay them itself (option `graphs`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..attention import rewrite
from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice
from ..cuda.driver import unavailable_reason as no_driver
from ..cuda.stream import cuda_stream
from ..device import Stream, Tensor
from ..engine import Shapes
from ..errors import BackendUnavailableError, EngineError, RequestError, StorageError, is_out_of_memory, reason
from ..onnx_graph import follow_links, graph_files, load_graph
from ..options import Tf32
from ..selfcheck import Place, accept, out_of_memory
from .session import OnnxRuntimeEngine

PROVIDER = "CUDAExecutionProvider"
Graphs = Literal["none", "onnxruntime"]


def unavailable_reason() -> str | None:
    """Return why this backend cannot run here, or None; imports ONNX Runtime only where there is a driver."""
    if why := no_driver():
        return why
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime-gpu is not installed: run `pip install 'latentrt[gpu]'`"
    except Exception as error:  # its native library raises whatever it likes
        return f"onnxruntime cannot be imported ({reason(error)}): run `pip install 'latentrt[gpu]'`"
    if PROVIDER not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime {onnxruntime.__version__} has no {PROVIDER}: "
            "run `pip uninstall onnxruntime` and `pip install 'latentrt[gpu]'`"
        )
    return None


class OnnxRuntimeCuda:
    """Opens bundle graphs with ONNX Runtime's CUDA provider."""

    name = "onnxruntime-cuda"
    dynamic = True
    can_capture = False

    def __init__(
        self,
        *,
        cache: EngineCache | None = None,
        gpu: Annotated[int, "which GPU, counted from 0"] = 0,
        graphs: Annotated[
            Graphs, "whether ONNX Runtime captures each engine's work and replays it (onnxruntime), or launches it"
        ] = "none",
        tf32: Tf32 = False,
    ) -> None:
        """Open a GPU; raises `BackendUnavailableError` where that cannot be done, `RequestError` for bad options."""
        if graphs not in get_args(Graphs):
            raise RequestError(f"graphs is {graphs!r}: choose {', '.join(get_args(Graphs))}")
        if why := unavailable_reason():
            raise BackendUnavailableError(f"backend {self.name}: {why}")
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from Python packages, where the system has none
        self.device = CudaDevice(gpu)
        self.lock = threading.RLock()
        with ExitStack() as undo:
            undo.callback(self.device.close)
            self.stream = self.device.stream()
            undo.pop_all()
        self.graphs: Graphs = graphs
        self.compiles_shapes = graphs == "onnxruntime"  # it captures each binding
        self.tf32 = tf32
        self._graph_ids = itertools.count(1)
        self._cache = cache or EngineCache()

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Do nothing: one engine serves every shape."""

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OnnxRuntimeEngine:
        """Open one graph of a bundle, whose session serves every shape, and check it the first time on this GPU."""
        engine = OnnxRuntimeEngine(graph, self._session(bundle, graph), self._bind, bundle.nbytes(graph))
        with self.lock:
            facts = {"gpu": self.device.name, "driver": self.device.driver_version}
            place = Place(self.name, self.device, facts, self._folder(bundle, graph), tf32=self.tf32)
            accept(engine, bundle, graph, place)
        return engine

    def _folder(self, bundle: Bundle, graph: GraphInfo) -> Path | None:
        """Return where the cache notes that engines of a graph have passed their check: it keeps nothing of them."""
        import onnxruntime

        key = {
            "backend": self.name,
            "graph": bundle.digest(graph),
            "onnxruntime": onnxruntime.__version__,
            "target": {"gpu": self.device.name, "driver": self.device.driver_version},
            "options": {"graphs": self.graphs, "tf32": self.tf32},
        }
        with suppress(StorageError):  # a cache that cannot be written
            return self._cache.get(graph.name, key, lambda folder: {})
        return None

    def _session(self, bundle: Bundle, graph: GraphInfo) -> Any:
        import onnxruntime as ort

        model, weights = _graph_for_cuda(graph_files(bundle, graph, "gpu"))
        options = ort.SessionOptions()
        options.log_severity_level = 4  # every failure is raised, with its text
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.enable_mem_pattern = False  # a pattern moves the arena at the second run, and captures keep addresses
        self.device.activate()
        provider = provider_options(self.device.number, self.stream.handle, self.graphs, self.tf32)
        try:
            session = ort.InferenceSession(model, options, providers=[(PROVIDER, provider)])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            if is_out_of_memory(error):
                raise out_of_memory(self.name, f"graph {graph.name} was opened") from error
            raise EngineError(f"graph {graph.name} cannot be opened on {self.name}: {reason(error)}") from error
        if PROVIDER not in session.get_providers():
            raise EngineError(
                f"onnxruntime opened graph {graph.name} without {PROVIDER}: "
                "a CUDA or cuDNN library that it needs is missing"
            )
        return session

    def _bind(self, engine: OnnxRuntimeEngine, tensors: Mapping[str, Tensor]) -> OnnxRuntimeCudaBinding:
        return OnnxRuntimeCudaBinding(self, engine, tensors)

    def run_options(self) -> Any:
        """Return the options of one binding's runs: without waiting, and with captured work of its own."""
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.graphs == "onnxruntime":
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)))
        return options


def provider_options(gpu: int, stream: int, graphs: Graphs, tf32: bool = False) -> dict[str, str]:
    """Return the CUDA provider's options: on a given stream, with an arena that grows by what is asked."""
    return {
        "device_id": str(gpu),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "1" if graphs == "onnxruntime" else "0",
        "use_tf32": "1" if tf32 else "0",  # its own default is to round
    }


class OnnxRuntimeCudaBinding:
    """Fixed addresses for one session."""

    def __init__(self, backend: OnnxRuntimeCuda, engine: OnnxRuntimeEngine, tensors: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._stream = backend.stream
        self._tensors = dict(tensors)  # keeps the memory alive
        self._addresses = engine.addresses(tensors, "cuda", backend.device.number)
        self._options = backend.run_options()
        self._device, self._captures = backend.device, backend.graphs == "onnxruntime"

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one run; returns without waiting for the GPU. Raises `EngineError` inside a capture."""
        queue = cuda_stream(stream)
        if queue.capturing is not None:
            raise EngineError(f"engine {self._engine.name} cannot be captured: run it in eager mode")
        self._stream.follow(queue)
        try:
            with self._device.releases.paused() if self._captures else nullcontext():  # it may capture in any run
                self._device.activate()
                self._engine.run(self._addresses, self._options)
        finally:
            queue.follow(self._stream)  # what a run that failed has launched uses the tensors too


def _graph_for_cuda(files: Sequence[Path]) -> tuple[bytes, Path]:
    """Return a graph without `Attention`, which releases before 1.25 run on the CPU, and the folder of its weights."""
    model = load_graph(files[0], "gpu")
    rewrite(model, fuse=True, expand=True)
    folder = follow_links(model, files)
    return model.SerializeToString(), folder
