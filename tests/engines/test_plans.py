"""Which plan serves which shapes, what makes a plan another one, and what is said when none fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import EngineError, MissingPlanError, ShapeError
from latentrt.engines.tensorrt.plan import PlanOptions, Profile, plan_key, profile_for, profile_from_json
from latentrt.engines.tensorrt.planner import check_tensors

from .simulated_backends import tensorrt_backend
from .small_bundles import WEIGHT, linear_bundle


def test_a_profile_covers_what_lies_between_its_shapes() -> None:
    profile = Profile.of({"x": (2, 8, 8)}, {"x": (4, 8, 16)}, {"x": (1, 8, 12)})
    assert profile.ranges == {"x": ((1, 8, 8), (2, 8, 8), (4, 8, 16))}
    for shape, fits in {(1, 8, 8): True, (3, 8, 9): True, (5, 8, 8): False, (1, 8, 17): False, (1, 8): False}.items():
        assert profile.covers({"x": shape}) == fits, shape
    assert not profile.covers({"x": (1, 8, 8), "y": (1,)})
    assert str(profile) == "x 1x8x8 to 4x8x16"


def test_a_profile_needs_every_shape_and_shapes_that_agree(bundle: Bundle) -> None:
    graph = bundle.graph("second")
    assert profile_for(graph, {"y": (2, 8), "order": (2,), "unused": (1,)}) == Profile.of({"y": (2, 8), "order": (2,)})
    with pytest.raises(ShapeError, match="needs the shape of its input 'order'"):
        profile_for(graph, {"y": (2, 8)})
    with pytest.raises(ShapeError, match="order has shape"):
        profile_for(graph, {"y": (2, 8), "order": (3,)})


KEY = {
    "backend": "tensorrt",
    "version": "10.13",
    "target": {"gpu": "A", "driver": "13.0"},
    "profile": Profile.of({"x": (2, 8)}),
    "options": PlanOptions(),
}


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "tensorrt-rtx"},
        {"version": "10.14"},
        {"target": {"gpu": "B", "driver": "13.0"}},
        {"target": {"gpu": "A", "driver": "13.1"}},
        {"profile": Profile.of({"x": (3, 8)})},
        {"profile": Profile.of({"x": (2, 8)}, {"x": (3, 8)})},
        {"options": PlanOptions(optimization_level=5)},
        {"options": PlanOptions(scratch=1 << 20)},
        {"options": PlanOptions(hardware="ampere_plus")},
        {"options": PlanOptions(weight_streaming=True)},
        {"options": PlanOptions(tf32=True)},
    ],
    ids=str,
)
def test_whatever_changes_a_plan_is_a_miss_and_nothing_else_is(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    cache, graph = EngineCache(tmp_path / "cache"), bundle.graph("first")
    cache.get("first", plan_key(bundle, graph, **KEY), lambda folder: {})  # type: ignore[arg-type]
    again = Bundle.open(bundle.path)
    assert cache.find("first", plan_key(again, again.graph("first"), **KEY))  # type: ignore[arg-type]
    assert cache.find("first", plan_key(bundle, graph, **{**KEY, **change})) is None
    changed = linear_bundle(tmp_path / "changed")
    files = {**changed.manifest.files, "first.onnx": replace_hash(changed)}
    changed.manifest = changed.manifest.model_copy(update={"files": files})
    assert cache.find("first", plan_key(changed, graph, **KEY)) is None  # type: ignore[arg-type]


def replace_hash(bundle: Bundle) -> Any:
    return bundle.manifest.files["first.onnx"].model_copy(update={"sha256": "0" * 64})


def test_a_dynamic_plan_serves_the_shapes_it_covers(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, graph = EngineCache(tmp_path / "cache"), bundle.graph("first")
    backend = tensorrt_backend(monkeypatch, cache)
    dynamic = backend.planner.build(bundle, graph, profile_for(graph, {"x": (2, 8)}, {"x": (4, 8)}))
    assert backend.planner.plan(bundle, graph, {"x": (3, 8)}).folder == dynamic.folder
    outside = backend.planner.plan(bundle, graph, {"x": (5, 8)})
    assert outside.folder != dynamic.folder and outside.profile == profile_for(graph, {"x": (5, 8)})
    own = backend.planner.build(bundle, graph, profile_for(graph, {"x": (3, 8)}))
    assert backend.planner.plan(bundle, graph, {"x": (3, 8)}).folder == own.folder

    engines = [backend.open(bundle, graph, {"x": (rows, 8)}) for rows in (2, 4)]
    with pytest.raises(ShapeError, match="engine first is for x 2x8 to 4x8"):
        engines[0].bind({name: backend.device.empty((5, 8), np.float32) for name in "xy"})
    engines[0].close()
    engines[1].bind({name: backend.device.empty((4, 8), np.float32) for name in "xy"})


def test_several_profiles_of_a_plan_are_told_apart() -> None:
    two, four = Profile.of({"x": (2, 8)}), Profile.of({"x": (4, 8)}, {"x": (6, 8)})
    both = Profile.together([two, four, two])
    assert both.all == (two, four) and Profile.together([two]) == two
    assert [both.index({"x": (rows, 8)}) for rows in (2, 3, 4, 5, 7)] == [0, None, 1, 1, None]
    assert both.covers({"x": (5, 8)}) and not both.covers({"x": (3, 8)})
    assert profile_from_json(json.loads(json.dumps(both.as_json()))) == both
    assert profile_from_json(json.loads(json.dumps(four.as_json()))) == four
    assert str(both) == "x 2x8 or x 4x8 to 6x8"


SEVERAL = [{"x": (rows, 8)} for rows in (2, 4, 8)]


def test_shapes_that_are_prepared_together_share_a_plan(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"))
    graph, planner = bundle.graph("first"), backend.planner
    single = planner.plan(bundle, graph, {"x": (4, 8)})
    backend.prepare(bundle, {"first": SEVERAL})
    (plan,) = planner.prepare(bundle, {"first": SEVERAL}, build=False)
    assert plan.folder != single.folder and plan.profile == Profile.together([profile_for(graph, s) for s in SEVERAL])
    engines = [backend.open(bundle, graph, shapes) for shapes in SEVERAL]
    assert len(backend._loaded) == 1  # also of the shape that has a plan of its own
    memory = [{name: backend.device.empty(each["x"], np.float32) for name in "xy"} for each in SEVERAL]
    bound = [engine.bind(tensors) for engine, tensors in zip(engines, memory, strict=True)]
    assert [each._context.profile for each in bound] == [0, 1, 2]
    stream = backend.device.stream()
    for number, (each, tensors) in enumerate(zip(bound, memory, strict=True)):
        values = np.random.default_rng(number).standard_normal(tensors["x"].shape).astype(np.float32)
        tensors["x"].write(values, stream)
        each.enqueue(stream)
        np.testing.assert_allclose(tensors["y"].read(stream), values @ WEIGHT, rtol=1e-5, atol=1e-6)
    for engine in engines:
        engine.close()
    assert not backend._loaded
    with pytest.raises(ShapeError, match="is for x 2x8 or x 4x8 or x 8x8: open it for"):
        backend.open(bundle, graph, SEVERAL[0]).bind({n: backend.device.empty((3, 8), np.float32) for n in "xy"})


def test_plans_of_one_shape_each_serve_several_where_none_is_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"))
    planner, graph = backend.planner, bundle.graph("first")
    with pytest.raises(MissingPlanError, match="no tensorrt plan of first fits x 2x8: the cache has none"):
        backend.prepare(bundle, {"first": SEVERAL}, build=False)
    singles = [planner.plan(bundle, graph, shapes) for shapes in SEVERAL]
    found = planner.prepare(bundle, {"first": SEVERAL}, build=False)
    assert [plan.folder for plan in found] == [plan.folder for plan in singles]


def test_a_missing_plan_says_what_there_is_and_how_to_build(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, graph = EngineCache(tmp_path / "cache"), bundle.graph("first")
    backend = tensorrt_backend(monkeypatch, cache, build=False)
    command = f"`latentrt build {bundle.path} --backend tensorrt --batch 2`"
    with pytest.raises(EngineError) as none:
        backend.open(bundle, graph, {"x": (2, 8)})
    assert str(none.value) == f"no tensorrt plan of first fits x 2x8: the cache has none. Build it with {command}"

    planner = backend.planner
    profile = profile_for(graph, {"x": (1, 8)})
    planner.build(bundle, graph, profile)
    gpu, planner.target = planner.target, {"gpu": "Other GPU", "compute_capability": "9.0", "driver": "13.0"}
    planner.build(bundle, graph, profile)
    planner.target, version = gpu, planner.library.version
    planner.library.version = "10.12"
    planner.build(bundle, graph, profile)
    planner.library.version, planner.options = version, replace(planner.options, optimization_level=1)
    planner.build(bundle, graph, profile)
    planner.options = PlanOptions()
    with pytest.raises(EngineError) as some:
        backend.open(bundle, graph, {"x": (2, 8)})
    message = str(some.value)
    assert "\n" not in message and message.endswith(command)
    for part in (
        "x 1x8",
        "compute capability 9.0, driver 13.0, gpu Other GPU (wanted: compute capability 8.9, driver 13.0, gpu Sim",
        "tensorrt 10.12 (installed: 0.simulated)",
        "other build options",
    ):
        assert part in message


def test_the_command_that_builds_a_missing_plan_names_its_options(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path / "cache")
    backend = tensorrt_backend(monkeypatch, cache, build=False, optimization_level=0, weights_on_gpu=1 << 20)
    with pytest.raises(EngineError, match="--batch 2 --option optimization_level=0 --option weights_on_gpu=0`"):
        backend.open(bundle, bundle.graph("first"), {"x": (2, 8)})


def test_a_plan_whose_tensors_are_not_the_manifest_s_is_refused(bundle: Bundle) -> None:
    graph = bundle.graph("second")
    tensors = [{"name": t.name, "mode": "input", "dtype": t.dtype, "shape": [-1] * len(t.shape)} for t in graph.inputs]
    tensors += [{"name": t.name, "mode": "output", "dtype": t.dtype, "shape": [-1, 8]} for t in graph.outputs]
    check_tensors(graph, tensors)
    for change, message in (
        ({"dtype": "int32"}, "input order of graph second is int32.* in the plan and int64"),
        ({"name": "other"}, "input order of graph second is missing"),
        ({"shape": [1, 2]}, "input order"),
    ):
        with pytest.raises(EngineError, match=message):
            check_tensors(graph, [tensors[0], {**tensors[1], **change}, tensors[2]])
    with pytest.raises(EngineError, match="a tensor 'extra' that the manifest lacks"):
        check_tensors(graph, [*tensors, {**tensors[2], "name": "extra"}])


def test_a_plan_of_other_tensors_than_the_manifest_s_is_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that was changed by hand, or a parser that renames."""
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "cache"))
    graph = bundle.graph("first")
    renamed = [spec.model_copy(update={"name": f"{spec.name}_2"}) for spec in graph.outputs]
    with pytest.raises(EngineError, match="output y_2 of graph first is missing in the plan"):
        backend.planner.build(
            bundle, graph.model_copy(update={"outputs": tuple(renamed)}), profile_for(graph, {"x": (2, 8)})
        )
    assert not backend.planner.cache.entries()
