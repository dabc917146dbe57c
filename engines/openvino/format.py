"""Graphs in OpenVINO's own format: written with what its Python interface cannot say, and with small weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .library import load_openvino

LAYERS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul")
MOVERS = ("Reshape", "Transpose")
"""What may stand between a layer and its weights."""
FEW = 4096
"""Numbers up to which weights are left alone."""


def write_model(model: Any, folder: Path, angles: set[str], *, bf16: bool) -> None:
    """Write `model.xml` and `model.bin`; nodes named in `angles` are not to be rounded.

    With `bf16` the weights of layers are stored in bf16, for models that compute in it: the numbers are the same, and
    the file half as large.
    """
    marks = {"precise": angles, "decompression": _store_in_bf16(model) if bf16 else set[str]()}
    load_openvino().serialize(model, folder / "model.xml", folder / "model.bin")
    tree = ElementTree.parse(folder / "model.xml")
    for layer in tree.getroot().iterfind("layers/layer"):
        for mark in (mark for mark, names in marks.items() if layer.get("name") in names):
            notes = layer.find("rt_info")
            if notes is None:
                notes = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, notes)
            ElementTree.SubElement(notes, "attribute", {"name": mark, "version": "0"})
    tree.write(folder / "model.xml")


def _store_in_bf16(model: Any) -> set[str]:
    """Put bf16 constants in the place of layers' float32 weights; returns the names of the nodes that widen them."""
    names, openvino = set[str](), load_openvino()
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != openvino.Type.f32:
            continue
        shape = list(node.get_output_shape(0))
        if len(shape) < 2 or np.prod(shape) <= FEW or not _feeds_layers_alone(node):
            continue
        small = openvino.Tensor(openvino.Type.bf16, openvino.Shape(shape))
        small.data.view(np.uint16)[...] = _rounded(node.get_data())
        wide = openvino.opset13.convert(openvino.op.Constant(small, shared_memory=True), "f32")
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(wide.output(0))
        name = node.get_friendly_name()
        node.set_friendly_name(f"{name}/replaced")
        wide.set_friendly_name(name)
        names.add(name)
    return names


def _feeds_layers_alone(node: Any) -> bool:
    """Tell whether whatever reads a constant is a layer."""
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    return bool(readers) and all(
        reader.get_type_name() in LAYERS or (reader.get_type_name() in MOVERS and _feeds_layers_alone(reader))
        for reader in readers
    )


def _rounded(numbers: Any) -> Any:
    """Return the upper halves of float32 numbers, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
