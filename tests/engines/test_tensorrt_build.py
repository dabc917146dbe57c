"""Plans built for real, by TensorRT-RTX, which needs no GPU to build. Nothing here says that a plan runs."""

from __future__ import annotations

import _thread
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from latentrt.engines.bundle import Bundle, GraphInfo, TensorInfo
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import BackendUnavailableError, BundleError, EngineError, RequestError
from latentrt.engines.tensorrt import builder as tensorrt_builder
from latentrt.engines.tensorrt import library as tensorrt_library
from latentrt.engines.tensorrt.backend import plan_options
from latentrt.engines.tensorrt.builder import build_plan
from latentrt.engines.tensorrt.library import load_library
from latentrt.engines.tensorrt.plan import PlanOptions, Profile
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from onnx import helper

from .small_bundles import graph_info, proto, write_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RTX = "tensorrt-rtx"
CHANNELS = 32


def vision_graph(dtype: str, rows: str | int = "R", side: str | int = "S") -> tuple[GraphInfo, onnx.GraphProto]:
    """Convolution, GroupNormalization and Attention, the operators that plans of diffusion models stand on."""
    x, y = (
        TensorInfo(name=n, dtype=dtype, shape=s)  # type: ignore[arg-type]
        for n, s in (
            ("x", (rows, CHANNELS, side, side)),
            ("y", (rows, 4, "T", 8) if rows == "R" else (rows, 4, 256, 8)),
        )
    )
    info = graph_info("vision", [x], [y])
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(dtype) / 17,
        "scale": np.ones(CHANNELS, dtype),
        "bias": np.zeros(CHANNELS, dtype),
        "flat": np.array([0, 0, -1]),
        "heads": np.array([0, 0, 4, 8]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("GroupNormalization", ["conv", "scale", "bias"], ["norm"], num_groups=8),
        helper.make_node("Reshape", ["norm", "flat"], ["pixels"]),
        helper.make_node("Transpose", ["pixels"], ["tokens"], perm=[0, 2, 1]),
    ]
    for name in "qkv":
        weights[f"w{name}"] = random.standard_normal((CHANNELS, CHANNELS)).astype(dtype) / 6
        nodes += [
            helper.make_node("MatMul", ["tokens", f"w{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 1, 3]),
        ]
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["y"]))
    return info, proto(info, nodes, weights)


def shapes(rows: int, side: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, CHANNELS, side, side)}


def planner(cache: Path, capability: str = "8.6", options: PlanOptions | None = None) -> Planner:
    target = target_of_compute_capability(RTX, capability)
    return Planner(RTX, target, cache=EngineCache(cache), options=options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("capability", ["8.6", "12.0"])
def test_static_and_dynamic_plans_build_without_a_gpu(tmp_path: Path, dtype: str, capability: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", vision_graph(dtype))
    graph, builder = bundle.graph("vision"), planner(tmp_path / "cache", capability)
    plans = [
        builder.build(bundle, graph, p) for p in (Profile.of(shapes(2, 16)), Profile.of(shapes(2, 16), shapes(4, 32)))
    ]
    assert plans[0].folder != plans[1].folder
    for plan in plans:
        facts = json.loads((plan.folder / "engine.json").read_text())
        assert facts["key"]["target"] == {"compute_capability": capability}
        assert [(t["mode"], t["name"], t["dtype"]) for t in facts["tensors"]] == [
            ("input", "x", dtype),
            ("output", "y", dtype),
        ]
        assert plan.path.stat().st_size == facts["plan_bytes"] > 10_000
    assert plans[0].path.read_bytes() != plans[1].path.read_bytes()


def test_a_plan_of_several_profiles_is_built_at_once(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", vision_graph("float16"))
    builder = planner(tmp_path / "cache", "8.6")
    (plan,) = builder.prepare(bundle, {"vision": [shapes(2, 16), shapes(4, 16), shapes(8, 16)]})
    assert [each.ranges["x"][1][0] for each in plan.profile.all] == [2, 4, 8]
    assert plan.path.stat().st_size == plan.facts["plan_bytes"] > 10_000
    assert builder.plan(bundle, bundle.graph("vision"), shapes(4, 16), build=False).folder == plan.folder


def test_fixed_shapes_and_external_weights(tmp_path: Path) -> None:
    info, graph = vision_graph("float16", rows=2, side=16)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", info.opset)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.data", size_threshold=0)
    assert (tmp_path / "g.data").stat().st_size > 20_000 > (tmp_path / "g.onnx").stat().st_size
    library = load_library(RTX)
    profile = Profile.of(shapes(2, 16))
    facts = build_plan(
        library, tmp_path / "g.onnx", tmp_path / "plan", profile, PlanOptions(), compute_capability="8.9"
    )
    assert facts["tensors"][0]["shape"] == [2, CHANNELS, 16, 16]
    (tmp_path / "g.data").unlink()
    with pytest.raises(EngineError, match=r"tensorrt-rtx cannot read g\.onnx"):
        build_plan(library, tmp_path / "g.onnx", tmp_path / "plan", profile, PlanOptions())


def test_every_attention_may_fall_apart_into_plain_layers(tmp_path: Path) -> None:
    write_bundle(tmp_path, vision_graph("float32"))
    library = load_library(RTX)
    builder = library.trt.Builder(library.logger)
    network = tensorrt_builder._parse(library, builder, tmp_path / "vision.onnx")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    attentions = [layer for layer in layers if layer.type == library.trt.LayerType.ATTENTION_OUTPUT]
    assert len(attentions) == 1
    attentions[0].__class__ = library.trt.IAttentionOutputLayer
    assert attentions[0].attention.decomposable


def test_options_reach_the_library(tmp_path: Path) -> None:
    library = load_library(RTX)
    trt = library.trt
    config = trt.Builder(library.logger).create_builder_config()
    options = PlanOptions(optimization_level=2, scratch=1 << 22, weight_streaming=True)
    tensorrt_builder._configure(library, config, options, "8.9")
    assert config.builder_optimization_level == 2
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 22
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert not config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION) and not config.get_flag(trt.BuilderFlag.REFIT)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    config = trt.Builder(library.logger).create_builder_config()
    tensorrt_builder._configure(library, config, PlanOptions(), None)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for tf32 in (False, True, False):
        tensorrt_builder._configure(library, config, PlanOptions(tf32=tf32), None)
        assert config.get_flag(trt.BuilderFlag.TF32) == tf32
    levels = {"NONE": 0, "AMPERE_PLUS": 1}
    old = SimpleNamespace(trt=SimpleNamespace(HardwareCompatibilityLevel=SimpleNamespace(__members__=levels)))
    old.backend, old.version = "tensorrt", "10.12"
    with pytest.raises(RequestError, match=r"same_compute_capability': tensorrt 10\.12 has ampere_plus"):
        tensorrt_builder._configure(old, config, PlanOptions(hardware="same_compute_capability"), None)  # type: ignore[arg-type]


def test_tf32_reaches_the_key_and_the_gpu_is_current_before_the_library_is_used(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", vision_graph("float32"))
    plans = [
        planner(tmp_path / "cache", options=plan_options(tf32=tf32)).build(
            bundle, bundle.graph("vision"), Profile.of(shapes(2, 16))
        )
        for tf32 in (False, True)
    ]
    assert plans[0].folder != plans[1].folder
    order: list[str] = []
    real = load_library(RTX)
    trt = SimpleNamespace(**{**vars(real.trt), "Builder": lambda logger: (order.append("builder"), stop())})
    library = SimpleNamespace(trt=trt, logger=real.logger, errors=[])

    def stop() -> None:
        raise EngineError("far enough")

    with pytest.raises(EngineError, match="far enough"):
        build_plan(
            library,  # type: ignore[arg-type]
            tmp_path / "bundle/vision.onnx",
            tmp_path / "plan",
            Profile.of(shapes(2, 16)),
            PlanOptions(),
            activate=lambda: order.append("gpu"),
        )
    assert order == ["gpu", "builder"]


def test_what_cannot_be_built_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    x = TensorInfo(name="x", dtype="float32", shape=("B", 8))
    info = graph_info("unknown", [x], [TensorInfo(name="y", dtype="float32", shape=("B", 8))])
    node = helper.make_node("Det", ["x3"], ["d"])  # TensorRT has no determinant
    nodes = [helper.make_node("Reshape", ["x", "square"], ["x3"]), node, helper.make_node("Mul", ["x", "one"], ["y"])]
    graph = proto(info, nodes, {"square": np.array([-1, 2, 2]), "one": np.ones(1, np.float32)})
    bundle = write_bundle(tmp_path / "bundle", (info, graph))
    builder = planner(tmp_path / "cache")
    with pytest.raises(EngineError, match=r"tensorrt-rtx cannot read unknown\.onnx: node .*Det") as error:
        builder.plan(bundle, info, {"x": (2, 8)})
    assert "\n" not in str(error.value)
    assert builder.cache.entries() == [] and not list((tmp_path / "cache/.building").iterdir())

    fixed, _ = vision_graph("float32")
    bundle = write_bundle(tmp_path / "vision", vision_graph("float32"))
    with pytest.raises(EngineError, match=r"vision\.onnx"):
        builder.build(bundle, fixed, Profile.of({"x": (2, 16, 16, 16)}))
    (bundle.path / "vision.onnx").write_bytes(b"not a graph")
    bundle.manifest = write_manifest_again(bundle)
    with pytest.raises(BundleError, match=r"vision\.onnx cannot be read as ONNX"):
        builder.build(bundle, fixed, Profile.of(shapes(2, 16)))
    assert builder.cache.entries() == []


def write_manifest_again(bundle: Bundle) -> object:
    from latentrt.engines.bundle import describe_files

    return bundle.manifest.model_copy(update={"files": describe_files(bundle.path)})


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_a_build(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", vision_graph("float16"))
    reported: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        reported.append((what, done, total))
        if len(reported) == 3:
            _thread.interrupt_main()
            time.sleep(1)

    builder = planner(tmp_path / "cache")
    builder._progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        builder.plan(bundle, bundle.graph("vision"), shapes(2, 16))
    assert len(reported) < 10  # of about a hundred: the builder stopped at its next step
    assert all(what.startswith("vision: ") and 1 <= done <= total for what, done, total in reported)
    assert builder.cache.entries() == [] and not list((tmp_path / "cache/.building").iterdir())
    builder._progress = None
    builder.plan(bundle, bundle.graph("vision"), shapes(2, 16))  # and the next build is not disturbed


def test_a_library_that_is_missing_or_too_old_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", "no_such_module")
    with pytest.raises(BackendUnavailableError, match=r"cannot be imported .*pip install 'latentrt\[tensorrt\]'"):
        tensorrt_library.Library("tensorrt")
    monkeypatch.setitem(tensorrt_library.OLDEST, RTX, (99, 0))
    with pytest.raises(BackendUnavailableError, match=r"1\.\d.* is installed, 99.0 or later is needed"):
        tensorrt_library.Library(RTX)
    for backend, capability in (("tensorrt", "8.6"), (RTX, "9.0"), (RTX, "ampere")):
        with pytest.raises(RequestError):
            target_of_compute_capability(backend, capability)
