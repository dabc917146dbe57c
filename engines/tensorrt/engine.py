"""TensorRT and TensorRT-RTX: static plans per shape from the engine cache, executed without waiting.

Each binding has its own execution context, with its addresses set once, so a captured graph stays valid. All contexts
of a backend share one arena of scratch memory: use one backend from one stream at a time.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice, CudaTensor, cuda_stream
from ..cuda.driver import unavailable_reason as no_driver
from ..device import Stream, Tensor
from ..engine import Shapes, check_binding, shape_of
from ..errors import BackendUnavailableError, EngineError, RequestError, ShapeError, StorageError
from ..files import write_atomically
from ..progress import Progress
from .arena import Arena, ArenaBlock
from .builder import EXTRAS, MODULES
from .plan import Plan, PlanOptions
from .planner import Planner, target_of_device


def unavailable_reason(name: str = "tensorrt") -> str | None:
    """Return why this backend cannot run here, or None; imports TensorRT nowhere."""
    if reason := no_driver():
        return reason
    if importlib.util.find_spec(MODULES[name]) is None:
        return f"{MODULES[name]} is not installed: run `pip install 'latentrt[{EXTRAS[name]}]'`"
    return None


def plan_options(
    optimization_level: int | None = None,
    scratch: int | None = None,
    hardware: str | None = None,
    weights_on_gpu: int | None = None,
) -> PlanOptions:
    """Return what plans are built with, from the options of the backend that shape a plan; raises `RequestError`."""
    if weights_on_gpu is not None and weights_on_gpu < 0:
        raise RequestError(f"weights_on_gpu is {weights_on_gpu}: give a number of bytes, 0 or more, such as 500MB")
    return PlanOptions(optimization_level, scratch, hardware, weights_on_gpu is not None)


class TensorRt:
    """Builds and opens TensorRT engines; `TensorRt("tensorrt-rtx")` does so with TensorRT-RTX."""

    dynamic = False

    def __init__(
        self,
        name: str = "tensorrt",
        *,
        cache: EngineCache | None = None,
        gpu: int = 0,
        build: bool = True,
        weights_on_gpu: int | None = None,
        optimization_level: int | None = None,
        scratch: int | None = None,
        hardware: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open a GPU. With `build=False` a missing plan is an error instead of minutes of building.

        `weights_on_gpu` is the number of bytes of an engine's weights that stay in GPU memory; the others are streamed
        from the host at each run, which rules out captured graphs. The other options are those of `PlanOptions`.
        """
        options = plan_options(optimization_level, scratch, hardware, weights_on_gpu)
        if reason := unavailable_reason(name):
            raise BackendUnavailableError(f"backend {name}: {reason}")
        self.name = name
        self.device = CudaDevice(gpu)
        self.can_capture = weights_on_gpu is None
        self.weights_on_gpu = weights_on_gpu
        target = target_of_device(name, self.device, options)
        self.planner = Planner(name, target, cache=cache, options=options, progress=progress)
        self.arena = Arena(self.device)
        self._build = build
        self._loaded: dict[Path, LoadedPlan] = {}

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> TensorRtEngine:
        """Open one graph for the given input shapes, building its plan first when the cache has none that fits."""
        plan = self.planner.plan(bundle, graph, shapes or {}, build=self._build)
        loaded = self._loaded.get(plan.folder)
        if loaded is None:
            loaded = self._loaded[plan.folder] = LoadedPlan(self, plan)
        loaded.users += 1
        return TensorRtEngine(self, graph, loaded)

    def release(self, loaded: LoadedPlan) -> None:
        """Free a plan's engine when the last `TensorRtEngine` that stands on it is closed."""
        loaded.users -= 1
        if loaded.users == 0:
            self._loaded.pop(loaded.plan.folder, None)
            self.device.activate().cuCtxSynchronize()
            loaded.close()


class LoadedPlan:
    """A deserialized plan; several `TensorRtEngine` may stand on one dynamic plan."""

    def __init__(self, backend: TensorRt, plan: Plan) -> None:
        backend.device.activate()
        self.plan = plan
        self.profile = plan.profile
        self.users = 0
        self.bindings: weakref.WeakSet[TensorRtBinding] = weakref.WeakSet()
        self._library = library = backend.planner.library
        library.errors.clear()
        self._runtime = library.trt.Runtime(library.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.path.read_bytes())
        if self._engine is None:
            raise library.failure(f"plan {plan.folder} cannot be loaded (delete its folder to build it again)")
        if backend.weights_on_gpu is not None:
            streamable = self._engine.streamable_weights_size
            self._engine.weight_streaming_budget_v2 = min(backend.weights_on_gpu, streamable)
        self._kernels: Any = None
        self._config = self._runtime_config()

    def context(self) -> Any:
        """Return a new execution context that takes its scratch memory from the caller."""
        user_managed = self._library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(user_managed if self._config is None else self._config)
        if context is None:
            raise self._library.failure(f"plan {self.plan.folder} gets no execution context")
        return context

    def save_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for this GPU beside the plan; without it every start compiles it again."""
        if self._kernels is None:
            return
        with suppress(StorageError):  # a cache that cannot be written still works
            write_atomically(self._kernels_file, bytes(memoryview(self._kernels.serialize())))

    def close(self) -> None:
        """Free the engine and the contexts of its bindings."""
        for binding in self.bindings:
            binding.close()
        self._engine = self._config = self._kernels = self._runtime = None

    def _runtime_config(self) -> Any:
        """Return TensorRT-RTX's runtime settings; TensorRT itself compiles nothing at run time and needs none.

        Kernels for dynamic shapes are compiled before they are needed: a captured graph would keep the slow fallback.
        """
        trt = self._library.trt
        if not hasattr(trt, "IRuntimeCache"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels = config.create_runtime_cache()
        if self._kernels_file.is_file():
            self._kernels.deserialize(self._kernels_file.read_bytes())  # refuses what another GPU or driver wrote
        config.set_runtime_cache(self._kernels)
        return config

    @property
    def _kernels_file(self) -> Path:
        return self.plan.folder / "kernels.cache"


class TensorRtEngine:
    """A graph on a loaded plan."""

    def __init__(self, backend: TensorRt, graph: GraphInfo, loaded: LoadedPlan) -> None:
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self.backend = backend
        self._loaded: LoadedPlan | None = loaded

    def bind(self, tensors: Mapping[str, Tensor]) -> TensorRtBinding:
        """Bind inputs and outputs to GPU memory; see `Engine.bind`."""
        if self._loaded is None:
            raise EngineError(f"engine {self.name} is closed")
        sizes = check_binding(self, tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items() if name in self.inputs}
        if not self._loaded.profile.covers(shapes):
            raise ShapeError(f"engine {self.name} is for {self._loaded.profile}: open it for {shapes}")
        unwanted = {
            name: self.backend.device.empty(shape_of(spec, sizes), spec.dtype)
            for name, spec in self.outputs.items()
            if name not in tensors
        }
        return TensorRtBinding(self, self._loaded, tensors, unwanted)

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self.backend.release(loaded)


class TensorRtBinding:
    """One execution context with fixed addresses. It must run once before it can be captured."""

    def __init__(
        self,
        engine: TensorRtEngine,
        loaded: LoadedPlan,
        tensors: Mapping[str, Tensor],
        unwanted: dict[str, CudaTensor],
    ) -> None:
        """Make the context, set shapes and addresses, and announce how much scratch memory it needs."""
        self._engine = engine
        self._loaded = loaded
        self._tensors = {**tensors, **unwanted}  # keeps the memory alive
        for extra in unwanted.values():
            weakref.finalize(self, extra.close)
        library = engine.backend.planner.library
        engine.backend.device.activate()
        library.errors.clear()
        self._context = loaded.context()
        for name, tensor in self._tensors.items():
            fits = name not in engine.inputs or self._context.set_input_shape(name, tensor.shape)
            if not fits or not self._context.set_tensor_address(name, tensor.pointer):
                raise library.failure(f"engine {engine.name} does not take {name} {list(tensor.shape)}")
        self._scratch = int(self._context.update_device_memory_size_for_shapes())
        engine.backend.arena.reserve(self._scratch)
        self._block: ArenaBlock | None = None
        loaded.bindings.add(self)

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one execution; returns without waiting for the GPU."""
        if self._context is None:
            raise EngineError(f"engine {self._engine.name} is closed")
        queue, backend = cuda_stream(stream), self._engine.backend
        first = self._block is None
        if queue.capturing is not None and (first or not backend.can_capture):
            why = "has not run yet" if backend.can_capture else "streams its weights from the host"
            raise EngineError(f"engine {self._engine.name} {why}: it cannot be captured; enqueue it outside a capture")
        if self._block is None:  # by now every binding has announced its need
            self._block = backend.arena.block(self._scratch)
            self._context.set_device_memory(self._block.pointer, self._block.nbytes)
        backend.device.activate()
        if not self._context.execute_async_v3(queue.handle):
            raise backend.planner.library.failure(f"engine {self._engine.name} failed")
        if first:
            self._loaded.save_kernels()

    def close(self) -> None:
        """Let go of the execution context and the scratch memory; calling it again does nothing."""
        self._context = self._block = None
