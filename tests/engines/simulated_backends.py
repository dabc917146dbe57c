"""The GPU backends on the simulated driver: their own code, with ONNX Runtime's CPU kernels in place of the libraries.

A plan of the simulated TensorRT is the ONNX file itself. Its contexts are as strict as the real ones: shapes before
scratch memory, scratch memory of the size that was asked for and zeroed by every run, all addresses set.
"""

from __future__ import annotations

import ctypes
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from latentrt.engines.backends import Backend, open_backend, unavailable_reasons
from latentrt.engines.cache import EngineCache
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime import cuda as onnxruntime_cuda
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt import planner
from latentrt.engines.tensorrt.builder import build_plan

from .simulated_cuda import SimulatedDriver

SIMULATED = ("simulated tensorrt", "simulated onnxruntime-cuda")
ON_A_GPU = [pytest.param(n, marks=pytest.mark.gpu) for n in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")]


class Session:
    """An ONNX Runtime session whose runs are work of a stream."""

    def __init__(self, model: str | bytes, stream: int | None, driver: SimulatedDriver) -> None:
        self.driver, self.stream = driver, stream
        self.real = _loaded(model, InferenceSession) if isinstance(model, bytes) else _opened(model)
        self.dtypes = {i.name: _dtype(i.type) for i in (*self.real.get_inputs(), *self.real.get_outputs())}
        self.inputs = [i.name for i in self.real.get_inputs()]
        self.outputs = [o.name for o in self.real.get_outputs()]

    def run(self, stream: int, addresses: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        def work() -> None:
            for pointer, _ in addresses.values():
                self.driver.check_memory(pointer)
            feeds = {n: self._view(n, *addresses[n]).copy() for n in self.inputs}
            wanted = [name for name in self.outputs if name in addresses]
            for name, value in zip(wanted, self.real.run(wanted, feeds), strict=True):
                pointer, shape = addresses[name]
                self._view(name, pointer, shape or value.shape)[...] = value

        self.driver.launch(stream, work, "engine")

    def _view(self, name: str, pointer: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        nbytes = int(np.prod(shape)) * self.dtypes[name].itemsize
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
        return raw.view(self.dtypes[name]).reshape(shape)

    # what the CUDA backend of ONNX Runtime uses

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> SimpleNamespace:
        addresses: dict[str, tuple[int, tuple[int, ...]]] = {}

        def bind(name: str, kind: str, gpu: int, dtype: Any, shape: tuple[int, ...], pointer: int) -> None:
            assert kind == "cuda" and np.dtype(dtype) == self.dtypes[name]
            addresses[name] = (pointer, tuple(shape))

        return SimpleNamespace(bind_input=bind, bind_output=bind, addresses=addresses)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        assert self.stream is not None
        self.run(self.stream, dict(binding.addresses))


class Context:
    """An execution context of the simulated TensorRT."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.wanted: int | None = None
        self.profile = 0

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert number > 0 and stream and not self.shapes
        self.profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name], self.wanted = tuple(shape), None
        return name in self.session.inputs

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return name in self.session.dtypes

    def update_device_memory_size_for_shapes(self) -> int:
        assert set(self.shapes) == set(self.session.inputs)
        self.wanted = 64 * sum(int(np.prod(shape)) for shape in self.shapes.values())
        return self.wanted

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        assert self.wanted is not None and nbytes >= self.wanted and pointer % 256 == 0
        self.scratch = (pointer, nbytes)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch is not None and set(self.addresses) == set(self.session.dtypes)
        pointer, nbytes = self.scratch

        def use_scratch() -> None:
            self.session.driver.check_memory(pointer)
            ctypes.memset(pointer, 0, nbytes)

        self.session.driver.launch(stream, use_scratch, "scratch")
        self.session.run(stream, {name: (p, self.shapes.get(name, ())) for name, p in self.addresses.items()})
        return True


class Library:
    """Stands in for `tensorrt.library.Library`."""

    version = "0.simulated"

    def __init__(self, driver: SimulatedDriver) -> None:
        self.errors: list[str] = []
        self.logger = None
        strategy = SimpleNamespace(USER_MANAGED="user managed")

        def deserialize(plan: bytes) -> Any:
            session = Session(bytes(plan), None, driver)
            return SimpleNamespace(create_execution_context=lambda how: Context(session))

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
        self.trt = SimpleNamespace(Runtime=lambda logger: runtime, ExecutionContextAllocationStrategy=strategy)

    def failure(self, what: str) -> EngineError:
        return EngineError("; ".join([what, *self.errors]))


def build_here(patch: pytest.MonkeyPatch) -> None:
    """Let plans be built in this process, by libraries that exist nowhere else."""

    def build(library: Any, graph: Path, output: Path, *what: Any, gpu: int | None, **how: Any) -> dict[str, Any]:
        return build_plan(library, graph, output, *what, **how)

    patch.setattr(planner, "build_in_child", build)


def tensorrt_backend(
    patch: pytest.MonkeyPatch, cache: EngineCache, driver: SimulatedDriver | None = None, **options: Any
) -> tensorrt.TensorRt:
    """Return the TensorRT backend on a simulated GPU."""
    driver = driver or SimulatedDriver()
    library = Library(driver)

    def build(library: Any, graph: Path, output: Path, *_: Any, gpu: int | None, **how: Any) -> dict[str, Any]:
        assert gpu is not None
        driver.built_on.append(gpu)
        shutil.copy(graph, output)
        session = _loaded(graph.read_bytes(), InferenceSession)
        infos = [("input", i) for i in session.get_inputs()] + [("output", o) for o in session.get_outputs()]
        tensors = [
            {"name": i.name, "mode": mode, "dtype": _dtype(i.type).name, "shape": list(i.shape)} for mode, i in infos
        ]
        return {"tensors": tensors}

    patch.setattr(tensorrt, "unavailable_reason", lambda name: None)
    patch.setattr(tensorrt, "CudaDevice", lambda gpu: CudaDevice(gpu, Driver(driver)))
    patch.setattr(planner, "load_library", lambda name: library)
    patch.setattr(planner, "build_in_child", build)
    return tensorrt.TensorRt("tensorrt", cache=cache, **options)


def onnxruntime_backend(
    patch: pytest.MonkeyPatch, driver: SimulatedDriver | None = None, **options: Any
) -> onnxruntime_cuda.OnnxRuntimeCuda:
    """Return the ONNX Runtime CUDA backend on a simulated GPU."""
    driver = driver or SimulatedDriver()

    def session(model: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Session:
        return Session(model, int(providers[0][1]["user_compute_stream"]), driver)

    patch.setattr(onnxruntime_cuda, "unavailable_reason", lambda: None)
    patch.setattr(onnxruntime_cuda, "CudaDevice", lambda gpu: CudaDevice(gpu, Driver(driver)))
    patch.setattr(ort, "InferenceSession", session)
    patch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    return onnxruntime_cuda.OnnxRuntimeCuda(**options)


def backend_named(name: str, patch: pytest.MonkeyPatch, cache: EngineCache) -> Backend:
    """Return a backend of this machine or one of `SIMULATED`; skips the test where it cannot run."""
    if name == "simulated tensorrt":
        return tensorrt_backend(patch, cache)
    if name == "simulated onnxruntime-cuda":
        return onnxruntime_backend(patch)
    if reason := unavailable_reasons()[name]:
        pytest.skip(reason)
    return open_backend(name, cache=cache)


InferenceSession = ort.InferenceSession


def _opened(model: str | bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=16)
def _loaded(model: bytes, kind: Any) -> Any:
    """Return the session of a plan; sessions hold no state, and opening one takes longer than most tests.

    `kind` is what opens it at the moment, which a test may replace.
    """
    return _opened(model)


def _dtype(name: str) -> np.dtype[Any]:
    names = {"float": "float32", "double": "float64"}
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype(names.get(inner, inner))
