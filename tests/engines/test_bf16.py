"""Graphs that compute in bf16 between float32 inputs and outputs: what builds them, what refuses them, their bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, Parity, TensorInfo
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.errors import EngineError
from latentrt.engines.host import HostDevice
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.selfcheck import BOUND, Place
from latentrt.engines.tensorrt.plan import Profile
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from onnx import TensorProto, helper

from .small_bundles import graph_info, proto, random, write_bundle

RTX = "tensorrt-rtx"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a bundle of one graph: attention over a projection, and another projection."""
    x, y = (TensorInfo(name=name, dtype="float32", shape=("R", "L", 16)) for name in "xy")
    info = graph_info("denoiser", [x], [y]).model_copy(update={"precision": "bf16"})
    weights = {f"w{name}": random(16, 16, seed=seed) / 4 for seed, name in enumerate("qkvo")}
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16)]
    nodes += [helper.make_node("Cast", [name], [f"{name}_16"], to=TensorProto.BFLOAT16) for name in weights]
    nodes += [helper.make_node("MatMul", ["h", f"w{name}_16"], [name]) for name in "qkv"]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["a"], q_num_heads=2, kv_num_heads=2, scale=0.35),
        helper.make_node("MatMul", ["a", "wo_16"], ["o"]),
        helper.make_node("Cast", ["o"], ["y"], to=TensorProto.FLOAT),
    ]
    return write_bundle(tmp_path / "bundle", (info, proto(info, nodes, weights)))


def test_tensorrt_rtx_builds_plans_with_borders_in_float32(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    planner = Planner(RTX, target_of_compute_capability(RTX, "8.9"), cache=EngineCache(tmp_path / "cache"))
    for shapes in ([{"x": (2, 8, 16)}], [{"x": (2, 8, 16)}, {"x": (4, 32, 16)}]):
        plan = planner.build(bundle, bundle.graph("denoiser"), Profile.of(*shapes))
        facts = json.loads((plan.folder / SIDECAR).read_text(encoding="utf-8"))
        assert [(t["name"], t["dtype"]) for t in facts["tensors"]] == [("x", "float32"), ("y", "float32")]


def test_onnxruntime_on_the_processor_refuses_before_it_builds(bundle: Bundle, tmp_path: Path) -> None:
    backend = OnnxRuntimeCpu(cache=EngineCache(tmp_path / "engines"), threads=1)
    message = (
        r"denoiser computes in bf16, which onnxruntime-cpu cannot: export the checkpoint in fp32, or use tensorrt,"
    )
    with pytest.raises(EngineError, match=message):
        backend.prepare(bundle, {"denoiser": {"x": (2, 8, 16)}})
    with pytest.raises(EngineError, match=message):
        backend.open(bundle, bundle.graph("denoiser"))
    assert not (tmp_path / "engines").exists()


def test_bounds_follow_the_number_format(bundle: Bundle) -> None:
    graph = bundle.graph("denoiser")
    place, rounding = (Place(RTX, HostDevice(), {}, None, tf32=tf32) for tf32 in (False, True))
    bounds = {name: graph.model_copy(update={"precision": name}) for name in ("fp32", "fp16", "bf16", None)}
    assert {name: place.bound(g) for name, g in bounds.items()} == {**BOUND, None: BOUND["fp32"]}
    assert {name: rounding.bound(g) for name, g in bounds.items()} == {
        "fp32": BOUND["fp16"],
        "fp16": BOUND["fp16"],
        "bf16": BOUND["bf16"],
        None: BOUND["fp16"],
    }


def test_rounding_to_bf16_stays_far_inside_its_bound() -> None:
    """A product of matrices, rounded as bf16 rounds: 16 bits are cut off a float32, to the nearest."""
    bits = random(64, 64).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    x = random(8, 64, seed=1)
    exact = x @ random(64, 64)
    error = np.sqrt(np.mean((x @ rounded - exact) ** 2) / np.mean(exact**2))
    assert 2**-11 < error < 2**-8 < BOUND["bf16"]


def test_the_layers_that_parity_was_measured_on_are_optional() -> None:
    measured = Parity(max_abs_error=0.1, relative_error=0.01)
    assert measured.layers is None
    assert Parity.model_validate({**measured.model_dump(), "layers": 2}).layers == 2
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Parity(max_abs_error=0.1, relative_error=0.01, layers=0)
