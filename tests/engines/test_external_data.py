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
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.onnx_graph import graph_files
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.export.layers import layer_errors
from onnx import TensorProto, helper

from .simulated_backends import backend_named, tensorrt_backend
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


def default_of_a_function(model: onnx.ModelProto, location: str) -> None:
    """A constant inside a function, whose value is the default of the function's attribute."""
    inner = helper.make_node("Constant", [], ["out"])
    inner.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="held"))
    opset = helper.make_opsetid("", 21)
    default = helper.make_attribute("held", external(location))
    model.functions.append(
        helper.make_function("own", "Held", [], ["out"], [inner], [opset], attribute_protos=[default])
    )


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


def test_defaults_of_functions_are_looked_at_too(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "w.data")
    model = onnx.load(bundle.path / "first.onnx", load_external_data=False)
    default_of_a_function(model, "other.data")
    (bundle.path / "first.onnx").write_bytes(model.SerializeToString())
    write_manifest(bundle.path, manifest_of(bundle.path, bundle.graph("first")))
    again = Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"takes weights from 'other\.data', which the manifest does not list"):
        graph_files(again, again.graph("first"), "cpu")


@pytest.mark.parametrize("place", [initializer, constant, branch])
def test_openvino_refuses_weights_from_anywhere_else(tmp_path: Path, place: Callable[[Any, str], None]) -> None:
    bundle, cache = bundle_of(tmp_path / "bundle", "other.data", place), EngineCache(tmp_path / "cache")
    with pytest.raises(BundleError, match="which the manifest does not list for graph first"):
        backend_named("openvino", pytest.MonkeyPatch(), cache).open(bundle, bundle.graph("first"))
    assert cache.entries() == []


def test_openvino_takes_no_file_for_another_format(tmp_path: Path) -> None:
    """A file that is an empty ONNX model and a model of OpenVINO's own format at once, with weights from anywhere."""
    bundle = bundle_of(tmp_path / "bundle", "w.data")
    (tmp_path / "secret").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (bundle.path / "first.bin").symlink_to(tmp_path / "secret")
    (bundle.path / "first.onnx").write_bytes(both_formats())
    write_manifest(bundle.path, manifest_of(bundle.path, bundle.graph("first")))
    again = Bundle.open(bundle.path)
    assert again.problems() == {}
    with pytest.raises(EngineError, match="graph first has no tensor 'x'"):
        backend_named("openvino", pytest.MonkeyPatch(), EngineCache(tmp_path / "cache")).open(
            again, again.graph("first")
        )


def both_formats() -> bytes:
    """Return such a file: as ONNX, fields that hold texts alone; as XML, a constant of 64 bytes that is returned."""
    layers = (
        b'<layers><layer id="0" name="x" type="Parameter" version="opset1"><data shape="2,8" element_type="f32"/>'
        b'<output><port id="0" precision="FP32" names="x"><dim>2</dim><dim>8</dim></port></output></layer>'
        b'<layer id="1" name="w" type="Const" version="opset1">'
        b'<data element_type="f32" shape="2,8" offset="0" size="64"/>'
        b'<output><port id="0" precision="FP32"><dim>2</dim><dim>8</dim></port></output></layer>'
        b'<layer id="2" name="y" type="Add" version="opset1"><data auto_broadcast="numpy"/><input><port id="0">'
        b'<dim>2</dim><dim>8</dim></port><port id="1"><dim>2</dim><dim>8</dim></port></input>'
        b'<output><port id="2" precision="FP32" names="y"><dim>2</dim><dim>8</dim></port></output></layer>'
        b'<layer id="3" name="r" type="Result" version="opset1"><input><port id="0"><dim>2</dim><dim>8</dim></port>'
        b"</input></layer></layers><edges>"
        b'<edge from-layer="0" from-port="0" to-layer="2" to-port="0"/>'
        b'<edge from-layer="1" from-port="0" to-layer="2" to-port="1"/>'
        b'<edge from-layer="2" from-port="2" to-layer="3" to-port="0"/></edges></net>'
    )
    head = b'net name="m" version="11"><!--'.ljust(60)
    rest = b"-->" + layers
    length, varint = len(rest), b""
    while length > 0x7F:
        varint, length = varint + bytes([length & 0x7F | 0x80]), length >> 7
    return b"\n" + bytes([60]) + head + b"z" + varint + bytes([length]) + rest


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
