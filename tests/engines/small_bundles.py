"""Bundles of small ONNX graphs made here, for tests of engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from latentrt.engines.bundle import (
    FORMAT_VERSION,
    Bundle,
    GraphInfo,
    LatentInfo,
    Manifest,
    TensorInfo,
    describe_files,
    write_manifest,
)
from latentrt.engines.device import Array
from onnx import TensorProto, helper, numpy_helper

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
WEIGHT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32) / 4


def write_bundle(folder: Path, *graphs: tuple[GraphInfo, onnx.GraphProto]) -> Bundle:
    """Write a bundle of the given graphs and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    for info, graph in graphs:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", info.opset)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, folder / info.files[0])
    write_manifest(folder, manifest_of(folder, *(info for info, _ in graphs)))
    return Bundle.open(folder)


def manifest_of(folder: Path, *graphs: GraphInfo, **scheduler: str) -> Manifest:
    """Return the manifest of a bundle whose files lie in a folder."""
    return Manifest(
        format_version=FORMAT_VERSION,
        family="test",
        precision="fp32",
        graphs=graphs,
        tokenizers=(),
        latent=LatentInfo(channels=4, downscale=8, size_multiple=8, default_height=64, default_width=64),
        scheduler=scheduler,
        files=describe_files(folder),
    )


def graph_info(name: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> GraphInfo:
    """Return the manifest entry of a graph that runs in the end stage."""
    return GraphInfo(
        name=name, stage="end", files=(f"{name}.onnx",), inputs=tuple(inputs), outputs=tuple(outputs), opset=23
    )


def proto(info: GraphInfo, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.GraphProto:  # type: ignore[type-arg]
    """Return a graph with the inputs and outputs that its manifest entry declares."""
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, KINDS[t.dtype], list(t.shape)) for t in tensors]
        for tensors in (info.inputs, info.outputs)
    )
    return helper.make_graph(
        nodes, info.name, inputs, outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )


def random(*shape: int, seed: int = 0) -> Array:
    """Return normally distributed numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear_bundle(folder: Path) -> Bundle:
    """Return a bundle of `first` (y = x W, total = the sum of y) and `second` (z = y[order] + y), [B, 8] throughout."""
    x, y, z = (TensorInfo(name=name, dtype="float32", shape=("B", 8)) for name in "xyz")
    total = TensorInfo(name="total", dtype="float32", shape=())
    order = TensorInfo(name="order", dtype="int64", shape=("B",))
    first, second = graph_info("first", [x], [y, total]), graph_info("second", [y, order], [z])
    return write_bundle(
        folder,
        (
            first,
            proto(
                first,
                [
                    helper.make_node("MatMul", ["x", "weight"], ["y"]),
                    helper.make_node("ReduceSum", ["y"], ["total"], keepdims=0),
                ],
                {"weight": WEIGHT},
            ),
        ),
        (
            second,
            proto(
                second,
                [
                    helper.make_node("Gather", ["y", "order"], ["picked"]),
                    helper.make_node("Add", ["picked", "y"], ["z"]),
                ],
                {},
            ),
        ),
    )
