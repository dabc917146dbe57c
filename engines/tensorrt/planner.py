"""Plans for one target: found in the engine cache, or built into it. Needs no GPU for TensorRT-RTX."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle, GraphInfo
from ..cache import EngineCache
from ..cuda.device import CudaDevice
from ..engine import Shapes, Sizes, solve_sizes
from ..errors import EngineError, RequestError
from ..onnx_graph import graph_files
from ..progress import Progress
from .child import build_in_child
from .library import EXTRAS, load_library
from .plan import PLAN, Plan, PlanOptions, Profile, find_dynamic, missing_plan, plan_key, profile_for

Target = Mapping[str, str]
"""What a plan runs on, as far as it matters to it."""

FIRST_WITH_FP8 = (8, 9)
"""The first compute capability that multiplies in fp8."""


def target_of_device(backend: str, device: CudaDevice, options: PlanOptions) -> Target:
    """Return the target of plans that are built for this machine's GPU."""
    capability = {"compute_capability": device.compute_capability}
    if options.hardware == "ampere_plus":
        return {"compute_capability": "8.0 or later"}
    if backend == "tensorrt-rtx" or options.hardware == "same_compute_capability":
        return capability
    return {"gpu": device.name, **capability, "driver": device.driver_version}


def target_of_compute_capability(backend: str, capability: str) -> Target:
    """Return the target of plans built ahead of time; raises `RequestError` for one that the library does not know."""
    if backend != "tensorrt-rtx":
        raise RequestError(f"backend {backend} builds on the GPU that runs the plan: give --backend tensorrt-rtx")
    known = load_library(backend).compute_capabilities()
    if capability not in known:
        raise RequestError(f"tensorrt-rtx has no compute capability {capability!r}: choose {', '.join(known)}")
    return {"compute_capability": capability}


class Planner:
    """Finds and builds plans of one backend for one target."""

    def __init__(
        self,
        backend: str,
        target: Target,
        *,
        cache: EngineCache | None = None,
        options: PlanOptions | None = None,
        progress: Progress | None = None,
        gpu: int | None = None,
    ) -> None:
        """Load the library; raises `BackendUnavailableError` when it cannot be imported.

        `gpu` is the number of the GPU that builds, where there is one.
        """
        if backend == "tensorrt-rtx" and options is not None and options.hardware:
            raise RequestError("tensorrt-rtx has no option hardware: its plans run on every GPU of an architecture")
        self.backend = backend
        self.library = load_library(backend)
        self.target = dict(target)
        self.cache = cache or EngineCache()
        self.options = options or PlanOptions()
        self._progress = progress
        self._gpu = gpu

    def plan(
        self,
        bundle: Bundle,
        graph: GraphInfo,
        shapes: Shapes,
        *,
        build: bool = True,
        request: Sizes | None = None,
        first: Iterable[Plan] = (),
    ) -> Plan:
        """Return a plan that serves the shapes: one made for them, else a dynamic one that covers them, else a new one.

        Of plans that are made for them, one of `first` is preferred. Raises `EngineError` when the build fails, and
        `MissingPlanError` when there is none and `build` is false: it names a command that builds for the sizes of a
        whole `request`, as far as they are known.
        """
        profile = profile_for(graph, shapes)
        key = self._key(bundle, graph, profile)
        for plan in first:
            if {**plan.facts["key"], "profile": None} == {**key, "profile": None} and profile in plan.profile.all:
                return plan
        if folder := self.cache.find(graph.name, key):
            return Plan.open(folder)
        if found := find_dynamic(self.cache, graph, key, shapes):
            return found
        if not build:
            raise missing_plan(self.cache, bundle, graph, key, request or sizes_of(bundle, {graph.name: shapes}))
        return self.build(bundle, graph, profile)

    def prepare(
        self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True
    ) -> list[Plan]:
        """Build the plans that a request lacks, given the input shapes of its graphs, and return them all.

        Of several shapes of a graph a plan is made that serves each by a profile of its own. Raises as `plan` does.
        """
        every = {name: [each] if isinstance(each, Mapping) else list(each) for name, each in shapes.items()}
        request = sizes_of(bundle, {name: each[-1] for name, each in every.items()})
        return [
            plan
            for name, each in every.items()
            for plan in self._plans(bundle, bundle.graph(name), each, build=build, request=request)
        ]

    def _plans(
        self, bundle: Bundle, graph: GraphInfo, shapes: Sequence[Shapes], *, build: bool, request: Sizes
    ) -> list[Plan]:
        together = Profile.together([profile_for(graph, each) for each in shapes])
        if together.others:
            key = self._key(bundle, graph, together)
            if build or self.cache.find(graph.name, key):
                return [self.build(bundle, graph, together)]
        return [self.plan(bundle, graph, each, build=build, request=request) for each in shapes]

    def build(self, bundle: Bundle, graph: GraphInfo, profile: Profile) -> Plan:
        """Return the plan of exactly this profile, building it when the cache has none."""
        _check_eight_bits(graph, self.target)

        def work(folder: Path) -> dict[str, Any]:
            start = time.perf_counter()
            files = graph_files(bundle, graph, EXTRAS[self.backend])
            facts = build_in_child(
                self.library,
                files[0],
                folder / PLAN,
                profile,
                self.options,
                compute_capability=self.target.get("compute_capability") if self.backend == "tensorrt-rtx" else None,
                timing_cache=self.cache.root / f"timings-{self.library.version}-{self._name()}.cache",
                progress=None if self._progress is None else self._named(graph.name),
                gpu=self._gpu,
            )
            check_tensors(graph, facts["tensors"])
            return {**facts, "build_seconds": round(time.perf_counter() - start, 3)}

        return Plan.open(self.cache.get(graph.name, self._key(bundle, graph, profile), work))

    def is_built(self, bundle: Bundle, graph: GraphInfo, profile: Profile) -> bool:
        """Tell whether the cache has the plan of exactly this profile."""
        return self.cache.find(graph.name, self._key(bundle, graph, profile)) is not None

    def _key(self, bundle: Bundle, graph: GraphInfo, profile: Profile) -> dict[str, Any]:
        return plan_key(
            bundle,
            graph,
            backend=self.backend,
            version=self.library.version,
            target=self.target,
            profile=profile,
            options=self.options,
        )

    def _name(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in "-".join(self.target.values()))

    def _named(self, graph: str) -> Progress:
        report = self._progress
        assert report is not None
        return lambda phase, done, total: report(f"{graph}: {phase}", done, total)


def _check_eight_bits(graph: GraphInfo, target: Target) -> None:
    """Raise `EngineError` for a graph in fp8 and a GPU that has no units for it."""
    capability = target.get("compute_capability", "")
    number = tuple(map(int, capability.partition(" ")[0].split("."))) if capability else FIRST_WITH_FP8
    if graph.quantization is not None and graph.quantization.precision == "fp8" and number < FIRST_WITH_FP8:
        raise EngineError(
            f"graph {graph.name} computes in fp8, which GPUs of compute capability {capability} cannot: it takes 8.9 "
            "or later; use the bundle before, or quantize it with --precision int8"
        )


def sizes_of(bundle: Bundle, shapes: Mapping[str, Shapes]) -> Sizes:
    """Return the sizes of a request from the shapes of its graphs.

    Letters are a graph's own, and the last graph that has one counts: networks come after graphs that come from no
    module, and a picture is encoded alone, whatever the batch.
    """
    sizes: Sizes = {}
    graphs = (bundle.graph(name) for name in shapes)
    for graph in sorted(graphs, key=lambda graph: (graph.stage != "image", graph.parity is not None)):
        sizes |= solve_sizes({spec.name: spec for spec in graph.inputs}, shapes[graph.name])
    return sizes


def check_tensors(graph: GraphInfo, tensors: list[dict[str, Any]]) -> None:
    """Check that a built network has the inputs and outputs that the manifest declares; raises `EngineError`."""
    built = {(t["mode"], t["name"]): t for t in tensors}
    for mode, specs in (("input", graph.inputs), ("output", graph.outputs)):
        for spec in specs:
            tensor = built.pop((mode, spec.name), None)
            if tensor is None or tensor["dtype"] != spec.dtype or len(tensor["shape"]) != len(spec.shape):
                got = f"{tensor['dtype']}{tensor['shape']}" if tensor else "missing"
                raise EngineError(
                    f"{mode} {spec.name} of graph {graph.name} is {got} in the plan and {spec.dtype}{list(spec.shape)} "
                    "in the manifest: export the checkpoint again"
                )
    if built:
        raise EngineError(f"the plan of {graph.name} has a tensor {next(iter(built))[1]!r} that the manifest lacks")
