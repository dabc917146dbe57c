"""TensorRT and TensorRT-RTX as a backend: a plan for each set of shapes, from the engine cache or built into it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice
from ..cuda.driver import module_exists
from ..cuda.driver import unavailable_reason as no_driver
from ..engine import Shapes
from ..errors import BackendUnavailableError, EngineError, RequestError, is_out_of_memory, reason
from ..options import Bytes, Tf32
from ..progress import Progress
from ..selfcheck import Place, accept, out_of_memory
from .arena import Arena
from .engine import Deserialized, LoadedPlan, TensorRtEngine, deserialize
from .library import EXTRAS, MODULES, load_library
from .plan import OptimizationLevel, OtherHardware, Plan, PlanOptions, Scratch, build_command
from .planner import Planner, sizes_of, target_of_device
from .step import checked_shapes

WeightsOnGpu = Annotated[
    Bytes | None,
    "weights of an engine that stay in GPU memory; the others come from the host at each run, which rules out captured "
    "graphs (default: all stay)",
]

log = logging.getLogger(__name__)


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
    compiles_shapes = True

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
            self.planner = Planner(name, target, cache=cache, options=options, progress=progress, gpu=gpu)
            undo.pop_all()
        self._arena = Arena(self.device)
        self._weights_on_gpu = weights_on_gpu
        self._build = build
        self._loaded: dict[Path, LoadedPlan] = {}
        self._prepared: dict[Path, Plan] = {}  # those of several profiles: their weights are shared where they are used

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> TensorRtEngine:
        """Open one graph for the given input shapes, building its plan first when the cache has none that fits."""
        first = (*self._prepared.values(), *(loaded.plan for loaded in self._loaded.values()))
        plan = self.planner.plan(bundle, graph, shapes or {}, build=self._build, first=first)
        loaded = self._loaded.get(plan.folder)
        if fresh := loaded is None:
            plan, parts = self._deserialized(bundle, graph, plan)
            loaded = LoadedPlan(plan, parts, self.device, self.planner.library, self._arena, self._weights_on_gpu)
            self._loaded[plan.folder] = loaded
        loaded.users += 1
        engine = TensorRtEngine(graph, loaded, self._release)
        if fresh:
            self._accept(engine, bundle, graph, loaded)
        return engine

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Build the plans that a request lacks; raises `MissingPlanError` where plans are not built."""
        for plan in self.planner.prepare(bundle, shapes, build=build and self._build):
            if plan.profile.others:
                self._prepared[plan.folder] = plan

    def _accept(self, engine: TensorRtEngine, bundle: Bundle, graph: GraphInfo, loaded: LoadedPlan) -> None:
        """Check a plan that was just loaded, once on each GPU, with scratch memory that does not stay."""
        device, plan = self.device, loaded.plan
        facts = {"gpu": device.name, "compute_capability": device.compute_capability, "driver": device.driver_version}
        profiles = loaded.profile.all
        lowest = {name: low for name, (low, _, _) in profiles[0].ranges.items()}
        highest = {name: high for name, (_, _, high) in profiles[-1].ranges.items()}
        shapes = (lowest, checked_shapes(graph, highest))
        place = Place(self.name, device, facts, plan.folder, shapes, self.planner.options.tf32)
        with self.lock:
            loaded.arena = Arena(device)
            try:
                accept(engine, bundle, graph, place)
            finally:
                loaded.arena = self._arena

    def _deserialized(
        self, bundle: Bundle, graph: GraphInfo, plan: Plan, *, again: bool = False
    ) -> tuple[Plan, Deserialized]:
        """Load a plan; one that does not load is dropped and built once more, where plans are built."""
        try:
            return plan, deserialize(plan, self.device, self.planner.library)
        except EngineError as error:
            if is_out_of_memory(error):
                raise out_of_memory(self.name, f"the plan of {graph.name} was loaded") from error
            if again:
                advice = "use another backend or another version of it, and report it"
                raise EngineError(f"{error}; it was built just now: {advice}") from error
            self.planner.cache.remove({"folder": plan.folder})
            if not self._build:
                options = plan.facts["key"]["options"]
                shapes = {name: best for name, (_, best, _) in plan.profile.ranges.items()}
                command = build_command(bundle, self.name, sizes_of(bundle, {graph.name: shapes}), options)
                raise EngineError(f"{error}; it was removed: build it again with `{command}`") from error
            log.warning("%s: it is built again", error)
        return self._deserialized(bundle, graph, self.planner.build(bundle, graph, plan.profile), again=True)

    def _release(self, loaded: LoadedPlan) -> None:
        """Free a plan's engine when the last `TensorRtEngine` that stands on it is closed."""
        loaded.users -= 1
        if loaded.users == 0:
            self._loaded.pop(loaded.plan.folder, None)
            loaded.close()
