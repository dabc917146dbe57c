"""TensorRT and TensorRT-RTX as a backend: a plan for each set of shapes, from the engine cache or built into it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice
from ..cuda.driver import module_exists
from ..cuda.driver import unavailable_reason as no_driver
from ..engine import Shapes
from ..errors import BackendUnavailableError, RequestError, reason
from ..options import Bytes, Tf32
from ..progress import Progress
from .arena import Arena
from .engine import LoadedPlan, TensorRtEngine
from .library import EXTRAS, MODULES, load_library
from .plan import OptimizationLevel, OtherHardware, PlanOptions, Scratch
from .planner import Planner, target_of_device

WeightsOnGpu = Annotated[
    Bytes | None,
    "weights of an engine that stay in GPU memory; the others come from the host at each run, which rules out captured "
    "graphs (default: all stay)",
]


def unavailable_reason(name: str = "tensorrt") -> str | None:
    """Return why this backend cannot run here, or None; imports TensorRT only where there is a driver. Never raises."""
    if why := no_driver():
        return why
    if not module_exists(MODULES[name]):
        return f"{MODULES[name]} is not installed: run `pip install 'latentrt[{EXTRAS[name]}]'`"
    try:
        load_library(name)
    except BackendUnavailableError as error:
        return str(error).removeprefix(f"backend {name}: ")
    except Exception as error:  # a release of another shape than those we know
        return f"the installed {MODULES[name]} cannot be used ({reason(error)})"
    return None


def plan_options(
    optimization_level: OptimizationLevel = None,
    scratch: Scratch = None,
    hardware: OtherHardware = None,
    weights_on_gpu: WeightsOnGpu = None,
    tf32: Tf32 = False,
) -> PlanOptions:
    """Return what plans are built with, from the options of the backend that shape a plan; raises `RequestError`."""
    if weights_on_gpu is not None and weights_on_gpu < 0:
        raise RequestError(f"weights_on_gpu is {weights_on_gpu}: give a number of bytes, 0 or more, such as 500MB")
    return PlanOptions(optimization_level, scratch, hardware, weights_on_gpu is not None, tf32)


class TensorRt:
    """Builds and opens TensorRT engines; `TensorRt("tensorrt-rtx")` does so with TensorRT-RTX.

    All execution contexts share one arena of scratch memory: use one backend from one stream at a time.
    """

    dynamic = False

    def __init__(
        self,
        name: str = "tensorrt",
        *,
        cache: EngineCache | None = None,
        gpu: Annotated[int, "which GPU, counted from 0"] = 0,
        build: Annotated[bool, "whether a missing plan is built; otherwise it is an error"] = True,
        weights_on_gpu: WeightsOnGpu = None,
        optimization_level: OptimizationLevel = None,
        scratch: Scratch = None,
        hardware: OtherHardware = None,
        tf32: Tf32 = False,
        progress: Progress | None = None,
    ) -> None:
        """Open a GPU; raises `BackendUnavailableError` where that cannot be done, `RequestError` for bad options."""
        options = plan_options(optimization_level, scratch, hardware, weights_on_gpu, tf32)
        if why := unavailable_reason(name):
            raise BackendUnavailableError(f"backend {name}: {why}")
        self.name = name
        self.device = CudaDevice(gpu)
        self.lock = threading.RLock()
        self.can_capture = weights_on_gpu is None
        with ExitStack() as undo:
            undo.callback(self.device.close)
            target = target_of_device(name, self.device, options)
            self.planner = Planner(
                name, target, cache=cache, options=options, progress=progress, activate=self.device.activate
            )
            undo.pop_all()
        self._arena = Arena(self.device)
        self._weights_on_gpu = weights_on_gpu
        self._build = build
        self._loaded: dict[Path, LoadedPlan] = {}

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> TensorRtEngine:
        """Open one graph for the given input shapes, building its plan first when the cache has none that fits."""
        plan = self.planner.plan(bundle, graph, shapes or {}, build=self._build)
        loaded = self._loaded.get(plan.folder)
        if loaded is None:
            loaded = LoadedPlan(plan, self.device, self.planner.library, self._arena, self._weights_on_gpu)
            self._loaded[plan.folder] = loaded
        loaded.users += 1
        return TensorRtEngine(graph, loaded, self._release)

    def _release(self, loaded: LoadedPlan) -> None:
        """Free a plan's engine when the last `TensorRtEngine` that stands on it is closed."""
        loaded.users -= 1
        if loaded.users == 0:
            self._loaded.pop(loaded.plan.folder, None)
            loaded.close()
