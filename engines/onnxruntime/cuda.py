"""ONNX Runtime on an NVIDIA GPU, on our memory and stream, nothing waiting in a run.

Sessions run on one stream of the backend's own, which is fixed when a session is made; each run is chained behind the
caller's stream and the caller's behind it, so any stream may be given. Captured graphs, by the option `graphs`:

    none           launches one by one
    onnxruntime    each binding is captured and replayed by ONNX Runtime itself
    ours           runs may be captured with `Stream.capture`. Not the default: releases up to 1.31 free host buffers in
                   a way that a capture forbids, and end the process, for graphs that use such buffers
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ..attention import load_graph, rewrite
from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice, CudaStream, cuda_stream
from ..cuda.driver import unavailable_reason as no_driver
from ..device import Stream, Tensor
from ..engine import Shapes, check_binding
from ..errors import BackendUnavailableError, EngineError, RequestError, reason

Graphs = Literal["none", "onnxruntime", "ours"]

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


def unavailable_reason(provider: str = "cuda") -> str | None:
    """Return why this backend cannot run here, or None; imports ONNX Runtime only where there is a driver."""
    if reason := no_driver():
        return reason
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime-gpu is not installed: run `pip install 'latentrt[gpu]'`"
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime {onnxruntime.__version__} has no {PROVIDERS[provider]}: "
            "run `pip uninstall onnxruntime` and `pip install 'latentrt[gpu]'`"
        )
    return None


class OnnxRuntimeCuda:
    """Opens bundle graphs with ONNX Runtime's CUDA provider, or with a TensorRT provider in front of it."""

    name = "onnxruntime-cuda"
    dynamic = True

    def __init__(
        self,
        *,
        cache: EngineCache | None = None,
        gpu: int = 0,
        provider: str = "cuda",
        graphs: Graphs = "none",
    ) -> None:
        """Open a GPU; raises `BackendUnavailableError` where that cannot be done."""
        if provider not in PROVIDERS:
            raise RequestError(f"provider is {provider!r}: choose {', '.join(PROVIDERS)}")
        if graphs not in get_args(Graphs):
            raise RequestError(f"graphs is {graphs!r}: choose {', '.join(get_args(Graphs))}")
        if reason := unavailable_reason(provider):
            raise BackendUnavailableError(f"backend {self.name}: {reason}")
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN from Python packages, where the system has none
        self.device = CudaDevice(gpu)
        self.stream = self.device.stream()
        self.provider = provider
        self.graphs: Graphs = graphs
        self.can_capture = graphs == "ours"
        self.graph_ids = itertools.count(1)
        self._cache = cache or EngineCache()

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OnnxRuntimeCudaEngine:
        """Open one graph of a bundle; its session serves every shape."""
        import onnxruntime as ort

        files = [bundle.file(name) for name in graph.files]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(files[0].parent))
        options.enable_mem_pattern = False  # a pattern moves the arena at the second run, and captures keep addresses
        self.device.activate()
        providers = provider_options(
            self.provider, self.device.number, self.stream.handle, self.graphs, self._cache.root / "onnxruntime"
        )
        try:
            session = ort.InferenceSession(_graph_for(self.provider, files[0]), options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise EngineError(f"graph {graph.name} cannot be opened on {self.name}: {reason(error)}") from error
        if PROVIDERS[self.provider] not in session.get_providers():
            raise EngineError(
                f"onnxruntime opened graph {graph.name} without {PROVIDERS[self.provider]}: "
                "a CUDA, cuDNN or TensorRT library that it needs is missing"
            )
        return OnnxRuntimeCudaEngine(self, graph, session)


def provider_options(
    provider: str, gpu: int, stream: int, graphs: Graphs, cache: Path
) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a session in order, all on one stream, with an arena that grows by what is asked."""
    common = {"device_id": str(gpu), "has_user_compute_stream": "1", "user_compute_stream": str(stream)}
    capture = "1" if graphs == "onnxruntime" else "0"
    cuda = {
        **{name: value for name, value in common.items() if name != "has_user_compute_stream"},
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": capture,
    }
    providers = [(PROVIDERS["cuda"], cuda)]
    if provider == "tensorrt":
        tensorrt = {
            **common,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_cuda_graph_enable": capture,
        }
        providers.insert(0, (PROVIDERS["tensorrt"], tensorrt))
    elif provider == "tensorrt-rtx":
        rtx = {**common, "nv_runtime_cache_path": str(cache), "enable_cuda_graph": capture}
        providers.insert(0, (PROVIDERS["tensorrt-rtx"], rtx))
    return providers


class OnnxRuntimeCudaEngine:
    """One session; each binding keeps its own input and output addresses."""

    def __init__(self, backend: OnnxRuntimeCuda, graph: GraphInfo, session: Any) -> None:
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self.backend = backend
        self.session = session

    def bind(self, tensors: Mapping[str, Tensor]) -> OnnxRuntimeCudaBinding:
        """Bind inputs and outputs to GPU memory; see `Engine.bind`."""
        if self.session is None:
            raise EngineError(f"engine {self.name} is closed")
        check_binding(self, tensors)
        return OnnxRuntimeCudaBinding(self, tensors)

    def close(self) -> None:
        """Free the session; calling it again does nothing."""
        self.session = None


class OnnxRuntimeCudaBinding:
    """Fixed addresses for one session. It must run once before it can be captured."""

    def __init__(self, engine: OnnxRuntimeCudaEngine, tensors: Mapping[str, Tensor]) -> None:
        import onnxruntime as ort

        backend = engine.backend
        self._engine = engine
        self._tensors = dict(tensors)  # keeps the memory alive
        self._binding = engine.session.io_binding()
        for name, tensor in tensors.items():
            bind = self._binding.bind_input if name in engine.inputs else self._binding.bind_output
            bind(name, "cuda", backend.device.number, tensor.dtype, tensor.shape, tensor.pointer)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if backend.graphs == "onnxruntime":
            self._options.add_run_config_entry("gpu_graph_id", str(next(backend.graph_ids)))
        self._ran = False

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one run; returns without waiting for the GPU."""
        engine, queue = self._engine, cuda_stream(stream)
        if engine.session is None:
            raise EngineError(f"engine {engine.name} is closed")
        if queue.capturing is not None:
            self._check_capture()
        own: CudaStream = engine.backend.stream
        own.follow(queue)
        try:
            engine.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise EngineError(f"engine {engine.name} failed: {reason(error)}") from error
        finally:
            queue.follow(own)  # a capture that failed must still be joined, or it cannot be ended
        self._ran = True

    def _check_capture(self) -> None:
        if not self._engine.backend.can_capture:
            raise EngineError(
                f"engine {self._engine.name} cannot be captured: open {self._engine.backend.name} with graphs='ours', "
                "or run its steps in eager mode"
            )
        if not self._ran:
            raise EngineError(f"engine {self._engine.name} has not run yet: enqueue it once outside a capture")


def _graph_for(provider: str, path: Path) -> bytes:
    """Return a graph without `Attention`: releases before 1.25 run it on the CPU, and TensorRT before 10.14 not at all.

    TensorRT, for its part, cannot read ONNX Runtime's own operator.
    """
    model = load_graph(path, "gpu")
    rewrite(model, fuse=provider == "cuda", expand=True)
    return model.SerializeToString()
