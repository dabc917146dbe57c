"""Step graphs with every option: checked by their recorded rows, and built by TensorRT-RTX without a GPU."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, write_manifest
from latentrt.engines.bundle.references import read_reference
from latentrt.engines.bundle.runs import runs
from latentrt.engines.cache import EngineCache
from latentrt.engines.engine import shape_of, solve_sizes
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.selfcheck import relative_error
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from latentrt.runtime.sampling.step_table import STEP_INPUTS

from .small_bundles import manifest_of

exporter = pytest.importorskip("latentrt.export.exporter", exc_type=ImportError)

OPTIONS = [chosen for count in (1, 2) for chosen in combinations(STEP_INPUTS, count)]


def bundle_of(folder: Path, precision: str, options: Any) -> Bundle:
    folder.mkdir()
    write_manifest(folder, manifest_of(folder, exporter.write_step_graph(folder, precision, 3, options)))
    return Bundle.open(folder)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", OPTIONS, ids=" and ".join)
def test_onnxruntime_reproduces_the_recorded_rows(options: Any, precision: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", precision, options)
    graph = bundle.graph("step")
    rows = read_reference(bundle, graph, graph.references[0])
    assert set(graph.limits) <= {spec.name for spec in graph.inputs}
    if "dynamic thresholding" in options:
        assert rows["quantiles"].ravel().tolist() == pytest.approx([0.4, 0, 0.9])
    engine = OnnxRuntimeCpu(cache=EngineCache(tmp_path / "cache"), threads=1).open(bundle, graph)
    engine.close()


@pytest.mark.parametrize("options", OPTIONS, ids=" and ".join)
def test_other_sizes_are_computed_from_the_graphs_own_definition(options: Any, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "fp32", options)
    graph = bundle.graph("step")
    sizes = {**graph.references[0].sizes, "h": 7, "w": 9}
    shapes = {spec.name: shape_of(spec, sizes) for spec in graph.inputs}
    (run,) = runs(bundle, graph, (shapes, shapes))
    assert run.expected and all(np.isfinite(array).all() for array in run.expected.values())
    assert solve_sizes({spec.name: spec for spec in graph.inputs}, shapes)["h"] == 7
    assert relative_error(run.expected["next_latents"], run.inputs["latents"]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("options", OPTIONS, ids=" and ".join)
def test_tensorrt_rtx_builds_them(options: Any, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    bundle = bundle_of(tmp_path / "bundle", "fp16", options)
    graph = bundle.graph("step")
    sizes = {**graph.references[0].sizes, "h": 64, "w": 64}
    small, large = ({**sizes, "h": side, "w": side} for side in (64, 64 if kind == "static" else 256))
    profile = profile_for(
        graph, *({spec.name: shape_of(spec, each) for spec in graph.inputs} for each in (small, large))
    )
    target = target_of_compute_capability("tensorrt-rtx", "8.9")
    plan = Planner("tensorrt-rtx", target, cache=EngineCache(tmp_path / "cache")).build(bundle, graph, profile)
    assert plan.path.stat().st_size > 0
