"""Plans from ONNX graphs: one builder over `tensorrt` (10.3 and later, 11) and `tensorrt_rtx`.

Precision lives in the graph's own types: networks are strongly typed. TensorRT itself needs a GPU to build;
TensorRT-RTX needs none and builds for a compute capability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..attention import rewrite
from ..errors import RequestError
from ..files import write_atomically
from ..onnx_graph import load_graph
from ..opset import lower_opset
from ..progress import Progress
from .library import EXTRAS, OLD_OPSET, Library
from .plan import PlanOptions, Profile

Activate = Callable[[], object]
"""Makes one GPU current in the calling thread."""


def build_plan(
    library: Library,
    graph: Path,
    output: Path,
    profile: Profile,
    options: PlanOptions,
    *,
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
    activate: Activate | None = None,
) -> dict[str, Any]:
    """Build the plan of an ONNX file (external data beside it) into `output` and return facts for its sidecar.

    `compute_capability` is the architecture that an RTX plan is for. `activate` makes the GPU that builds current in
    the calling thread; without it CUDA takes the first. Raises `EngineError` with the library's own first errors.
    """
    trt = library.trt
    library.errors.clear()
    if activate is not None:
        activate()
    builder = trt.Builder(library.logger)
    network = _parse(library, builder, graph)
    config = builder.create_builder_config()
    _configure(library, config, options, compute_capability)
    try:
        fits = all(_add_profile(builder, config, each) for each in profile.all)
    except (ValueError, RuntimeError) as error:
        library.errors.append(str(error))
        fits = False
    if not fits:
        raise library.failure(f"graph {graph.name} does not take the shapes {profile}")
    timings = _load_timing_cache(library, config, timing_cache)
    plan = _build(library, builder, network, config, graph.name, progress)
    output.write_bytes(memoryview(plan))
    if timings is not None and timing_cache is not None:
        write_atomically(timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return {"tensors": _tensors(network), "layers": network.num_layers, "plan_bytes": output.stat().st_size}


def _parse(library: Library, builder: Any, graph: Path) -> Any:
    trt = library.trt
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, library.logger)
    model = load_graph(graph, EXTRAS[library.backend])
    if library.reads_attention:
        rewrite(model, expand_masked_causal=True)
    else:
        rewrite(model, expand=True)
        lower_opset(model, OLD_OPSET)
    parsed = parser.parse(model.SerializeToString(), str(graph))
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        library.errors[:0] = [f"node {error.node_name()}: {error.desc()}" for error in errors]
        raise library.failure(f"{library.backend} cannot read {graph.name}")
    attention = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if attention is not None and layer.type == attention:
            # `get_layer` returns the base class. Without this, an Attention that no fused kernel serves can fail the
            # build; with it, such an Attention (and no other) falls apart into MatMul and Softmax.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
    return network


def _configure(library: Library, config: Any, options: PlanOptions, compute_capability: str | None) -> None:
    trt = library.trt
    if options.scratch is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.scratch)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware is not None:
        levels = {n.lower(): level for n, level in trt.HardwareCompatibilityLevel.__members__.items() if n != "NONE"}
        if options.hardware not in levels:
            raise RequestError(
                f"hardware is {options.hardware!r}: {library.backend} {library.version} has {', '.join(levels)}"
            )
        config.hardware_compatibility_level = levels[options.hardware]
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:  # the library's own default is to round
        config.set_flag(tf32) if options.tf32 else config.clear_flag(tf32)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    elif hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # the plan never allocates while it runs or is captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if compute_capability is not None:
        known = library.compute_capabilities()
        config.num_compute_capabilities = 1
        config.set_compute_capability(known.get(compute_capability, trt.ComputeCapability.CURRENT), 0)


def _add_profile(builder: Any, config: Any, profile: Profile) -> bool:
    shapes = builder.create_optimization_profile()
    for name, (low, best, high) in profile.ranges.items():
        shapes.set_shape(name, low, best, high)
    return bool(config.add_optimization_profile(shapes) >= 0)


def _build(library: Library, builder: Any, network: Any, config: Any, name: str, progress: Progress | None) -> Any:
    if progress is not None and hasattr(library.trt, "IProgressMonitor"):
        monitor = _monitor(library.trt, progress)  # the config does not keep it alive
        config.progress_monitor = monitor
    try:
        plan = builder.build_serialized_network(network, config)
    except Exception as error:  # the bindings raise RuntimeError and ValueError
        library.errors.append(str(error))
        plan = None
    if plan is None:
        raise library.failure(f"{library.backend} cannot build {name}")
    return plan


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            progress(name, step + 1, self.phases.get(name, step + 1))
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()


def _load_timing_cache(library: Library, config: Any, path: Path | None) -> Any:
    """Give the builder the timings of earlier builds; TensorRT-RTX measures nothing when it builds and has none."""
    if path is None or library.backend != "tensorrt":
        return None
    data = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(data)
    if not config.set_timing_cache(timings, False):  # written by another version or for another GPU
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _tensors(network: Any) -> list[dict[str, Any]]:
    """Return name, kind, dtype and shape (-1 where dynamic) of the built network's inputs and outputs."""
    inputs = [("input", network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [("output", network.get_output(i)) for i in range(network.num_outputs)]
    return [
        {"name": t.name, "mode": mode, "dtype": _DTYPES.get(t.dtype.name, t.dtype.name), "shape": list(t.shape)}
        for mode, t in inputs + outputs
    ]


_DTYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
