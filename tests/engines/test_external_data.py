"""Weights outside an ONNX file: only from files that the manifest lists for that graph, with the hash it says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrt.engines.bundle import Bundle, GraphInfo, TensorInfo, write_manifest
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import BundleError
from latentrt.engines.onnx_graph import graph_files
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.export.layers import layer_errors
from onnx import TensorProto, helper

from .simulated_backends import tensorrt_backend
from .small_bundles import WEIGHT, graph_info, manifest_of, proto


def external(location: str, name: str = "weight") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def initializer(graph: onnx.GraphProto, location: str) -> None:
    graph.initializer.append(external(location))


def constant(graph: onnx.GraphProto, location: str) -> None:
    graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=external(location)))


def branch(graph: onnx.GraphProto, location: str) -> None:
    graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    inner = [helper.make_node("Constant", [], ["inside"], value=external(location))]
    output = [helper.make_tensor_value_info("inside", TensorProto.FLOAT, [8, 8])]
    taken = helper.make_graph(inner, "taken", [], output)
    graph.node.insert(0, helper.make_node("If", ["yes"], ["weight"], then_branch=taken, else_branch=taken))


def bundle_of(
    folder: Path, location: str, place: Callable[[Any, str], None] = initializer, listed: tuple[str, ...] = ("w.data",)
) -> Bundle:
    """Write a bundle of one graph, y = x W, with W in a file of its own."""
    folder.mkdir()
    (folder / "w.data").write_bytes(WEIGHT.tobytes())
    (folder / "other.data").write_bytes(WEIGHT.tobytes())
    x, y = (TensorInfo(name=name, dtype="float32", shape=("B", 8)) for name in "xy")
    info = GraphInfo(**{**graph_info("first", [x], [y]).model_dump(), "files": ("first.onnx", *listed)})
    graph = proto(info, [helper.make_node("MatMul", ["x", "weight"], ["y"])], {})
    place(graph, location)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", info.opset)], ir_version=10)
    (folder / "first.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, manifest_of(folder, info))
    return Bundle.open(folder)


def times_w(bundle: Bundle, cache: Path) -> Any:
    backend = OnnxRuntimeCpu(cache=EngineCache(cache), threads=1)
    engine, stream = backend.open(bundle, bundle.graph("first")), backend.device.stream()
    x, y = (backend.device.empty((2, 8), np.float32) for _ in "xy")
    x.write(np.eye(2, 8, dtype=np.float32), stream)
    engine.bind({"x": x, "y": y}).enqueue(stream)
    return y.read(stream).copy()


@pytest.mark.parametrize("place", [initializer, constant, branch])
@pytest.mark.parametrize(
    "location", ["other.data", "../secret", "/etc/hostname", "./w.data", "first.onnx", "*/_ORT_MEM_ADDR_/*", ""]
)
def test_weights_from_anywhere_else_are_refused_before_a_backend_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, place: Callable[[Any, str], None]
) -> None:
    (tmp_path / "secret").write_bytes(bytes(256))
    bundle = bundle_of(tmp_path / "bundle", location, place)
    graph, cache = bundle.graph("first"), EngineCache(tmp_path / "cache")
    message = "which the manifest does not list for graph first"
    with pytest.raises(BundleError, match=message):
        graph_files(bundle, graph, "cpu")
    with pytest.raises(BundleError, match=message):
        OnnxRuntimeCpu(cache=cache, threads=1).open(bundle, graph)
    planner = tensorrt_backend(monkeypatch, cache).planner
    with pytest.raises(BundleError, match=message):
        planner.build(bundle, graph, profile_for(graph, {"x": (2, 8)}))
    assert cache.entries() == []


@pytest.mark.parametrize("place", [initializer, constant, branch])
def test_weights_of_listed_files_are_read(tmp_path: Path, place: Callable[[Any, str], None]) -> None:
    bundle = bundle_of(tmp_path / "bundle", "w.data", place)
    assert [path.name for path in graph_files(bundle, bundle.graph("first"), "cpu")] == ["first.onnx", "w.data"]
    if place is initializer:
        assert np.allclose(times_w(bundle, tmp_path / "cache"), WEIGHT[:2], atol=1e-6)


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "w.data")
    (bundle.path / "w.data").write_bytes(bytes(256))
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        times_w(bundle, tmp_path / "cache")


def test_a_bundle_of_links_runs(tmp_path: Path) -> None:
    """The hub's cache keeps a snapshot as links to files named by their hash."""
    bundle = bundle_of(tmp_path / "bundle", "w.data")
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(["first.onnx", "w.data", "other.data"]):
        (bundle.path / name).rename(tmp_path / "blobs" / str(number))
        (bundle.path / name).symlink_to(Path("..") / "blobs" / str(number))
    assert np.allclose(times_w(Bundle.open(bundle.path), tmp_path / "cache"), WEIGHT[:2], atol=1e-6)
    if importlib.util.find_spec("polygraphy") is not None:
        (report,) = layer_errors(Bundle.open(bundle.path), "first", "onnxruntime-cpu")
        assert (report.tensor, report.nan_count) == ("y", 0) and report.relative_error < 1e-6
