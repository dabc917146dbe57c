"""Plans of TensorRT and TensorRT-RTX, loaded, bound and executed without waiting.

Each binding has its own execution context, with its addresses set once, so a captured graph stays valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from ..bundle import GraphInfo
from ..cuda.device import CudaDevice
from ..cuda.memory import CudaTensor
from ..cuda.stream import cuda_stream
from ..device import Stream, Tensor
from ..engine import check_binding, shape_of
from ..errors import EngineError, ShapeError, reason
from ..files import mapped, write_note
from .arena import Arena, ArenaBlock
from .library import Library
from .plan import Plan

Deserialized = tuple[Any, Any]
"""The library's runtime and its engine."""


def deserialize(plan: Plan, device: CudaDevice, library: Library) -> Deserialized:
    """Load a plan's engine onto a GPU; raises `EngineError` when the library refuses it."""
    device.activate()
    library.errors.clear()
    engine, runtime = None, library.trt.Runtime(library.logger)
    try:
        with mapped(plan.path) as serialized:  # a copy of gigabytes would count twice where GPU and host share memory
            engine = runtime.deserialize_cuda_engine(serialized)
    except Exception as error:  # the bindings raise what they like, and files can go meanwhile
        library.errors.append(reason(error))
    if engine is None:
        raise library.failure(f"plan {plan.folder} cannot be loaded")
    return runtime, engine


class LoadedPlan:
    """A deserialized plan; several `TensorRtEngine` may stand on one dynamic plan."""

    def __init__(
        self,
        plan: Plan,
        parts: Deserialized,
        device: CudaDevice,
        library: Library,
        arena: Arena,
        weights_on_gpu: int | None,
    ) -> None:
        """Take over a loaded plan; `weights_on_gpu` is the bytes of its weights that stay there (None: all)."""
        device.activate()
        self.plan = plan
        self.profile = plan.profile
        self.device = device
        self.library = library
        self.arena = arena
        self.streams_weights = weights_on_gpu is not None
        self.users = 0
        self.nbytes = plan.path.stat().st_size
        self.bindings: weakref.WeakSet[TensorRtBinding] = weakref.WeakSet()
        self._runtime, self._engine = parts
        if weights_on_gpu is not None:
            streamable = self._engine.streamable_weights_size
            self._engine.weight_streaming_budget_v2 = min(weights_on_gpu, streamable)
        self._kernels: Any = None
        self._config = self._runtime_config()

    def context(self, profile: int = 0) -> Any:
        """Return a new execution context of a profile, which takes its scratch memory from the caller."""
        user_managed = self.library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(user_managed if self._config is None else self._config)
        if context is None:
            raise self.library.failure(f"plan {self.plan.folder} gets no execution context")
        if profile:  # a new context has the first one
            with closing(self.device.stream()) as stream:
                chosen = context.set_optimization_profile_async(profile, stream.handle)
            if not chosen:
                raise self.library.failure(f"plan {self.plan.folder} has no profile {profile}")
        return context

    def save_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for this GPU beside the plan; without it every start compiles it again."""
        if self._kernels is None:
            return
        write_note(self._kernels_file, bytes(memoryview(self._kernels.serialize())))

    def close(self) -> None:
        """Free the engine and the contexts of its bindings once the work that uses them is done."""
        for binding in tuple(self.bindings):
            binding.close()
        held = [self._config, self._kernels, self._engine, self._runtime]
        self._engine = self._config = self._kernels = self._runtime = None
        self.device.release(lambda _: _let_go(held))

    def _runtime_config(self) -> Any:
        """Return TensorRT-RTX's runtime settings; TensorRT itself compiles nothing at run time and needs none.

        Kernels for dynamic shapes are compiled before they are needed: a captured graph would keep the slow fallback.
        """
        trt = self.library.trt
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

    def __init__(self, graph: GraphInfo, loaded: LoadedPlan, release: Callable[[LoadedPlan], None]) -> None:
        """`release` is called once, when the engine is closed."""
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self._loaded: LoadedPlan | None = loaded
        self._release = release

    @property
    def nbytes(self) -> int:
        """Bytes of its plan, its part where several engines stand on one."""
        return 0 if self._loaded is None else self._loaded.nbytes // self._loaded.users

    def bind(self, tensors: Mapping[str, Tensor]) -> TensorRtBinding:
        """Bind inputs and outputs to GPU memory; see `Engine.bind`."""
        if self._loaded is None:
            raise EngineError(f"engine {self.name} is closed")
        sizes = check_binding(self, tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items() if name in self.inputs}
        if (profile := self._loaded.profile.index(shapes)) is None:
            raise ShapeError(f"engine {self.name} is for {self._loaded.profile}: open it for {shapes}")
        unwanted = {}
        with ExitStack() as undo:
            for name, spec in self.outputs.items():
                if name not in tensors:
                    unwanted[name] = extra = self._loaded.device.empty(shape_of(spec, sizes), spec.dtype)
                    undo.callback(extra.close)
            binding = TensorRtBinding(self, self._loaded, profile, tensors, unwanted)
            undo.pop_all()
        return binding

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._release(loaded)


class TensorRtBinding:
    """One execution context with fixed addresses. It must run once before it can be captured."""

    def __init__(
        self,
        engine: TensorRtEngine,
        loaded: LoadedPlan,
        profile: int,
        tensors: Mapping[str, Tensor],
        unwanted: dict[str, CudaTensor],
    ) -> None:
        """Make the context, choose a profile, set shapes and addresses, and announce its need of scratch memory."""
        self._engine = engine
        self._loaded = loaded
        self._tensors = {**tensors, **unwanted}  # keeps the memory alive
        loaded.device.activate()
        loaded.library.errors.clear()
        self._context = loaded.context(profile)
        for name, tensor in self._tensors.items():
            fits = name not in engine.inputs or self._context.set_input_shape(name, tensor.shape)
            if not fits or not self._context.set_tensor_address(name, tensor.pointer):
                raise loaded.library.failure(f"engine {engine.name} does not take {name} {list(tensor.shape)}")
        self._scratch = int(self._context.update_device_memory_size_for_shapes())
        loaded.arena.reserve(self._scratch)
        self._block: ArenaBlock | None = None
        loaded.bindings.add(self)
        self._free = weakref.finalize(self, _drop, loaded.device, [self._context], tuple(unwanted.values()))
        self._free.atexit = False  # the driver goes with the process

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one execution; returns without waiting for the GPU."""
        if self._context is None:
            raise EngineError(f"engine {self._engine.name} is closed")
        queue, loaded = cuda_stream(stream), self._loaded
        first = self._block is None
        if queue.capturing is not None and (first or loaded.streams_weights):
            why = "streams its weights from the host" if loaded.streams_weights else "has not run yet"
            raise EngineError(f"engine {self._engine.name} {why}: it cannot be captured; enqueue it outside a capture")
        if self._block is None:  # by now every binding has announced its need
            self._block = loaded.arena.block(self._scratch)
            self._context.set_device_memory(self._block.pointer, self._block.nbytes)
        loaded.device.activate()
        if not self._context.execute_async_v3(queue.handle):
            raise loaded.library.failure(f"engine {self._engine.name} failed")
        if first:
            loaded.save_kernels()

    def close(self) -> None:
        """Let go of the execution context and the scratch memory; calling it again does nothing."""
        self._context = self._block = None
        if held := self._free.detach():
            _free(*held[2])


def _free(device: CudaDevice, contexts: list[Any], tensors: Sequence[CudaTensor]) -> None:
    """Free what a binding made, once the work that uses it is done."""
    with ExitStack() as undo:
        for tensor in tensors:
            undo.callback(tensor.close)
        device.release(lambda _: _let_go(contexts))


def _drop(device: CudaDevice, contexts: list[Any], tensors: Sequence[CudaTensor]) -> None:
    """Free what a forgotten binding made; a driver that fails then has nobody to tell."""
    with suppress(EngineError):
        _free(device, contexts, tensors)


def _let_go(objects: list[Any]) -> None:
    """Drop the last references to a library's objects, in this order."""
    while objects:
        objects.pop(0)
