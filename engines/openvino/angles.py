"""Angles stay in float32: whatever a graph computes a sine or a cosine of, in models that round the rest.

bf16 has no 499, and an angle is a timestep, or a place, times a frequency: rounded on the way it is another one. For
Stable Diffusion 1.5's U-Net (random weights) the relative error at timestep 999 is 0.015 with this and 0.116 without.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .library import load_openvino

ENDS = ("Parameter", "Constant", "Convolution", "MatMul")
"""Where a walk back from an angle ends: at what is given, and at layers, whose results are rounded in any case."""


def angles_of(model: Any) -> set[str]:
    """Return the names of the nodes that angles, sines and cosines are computed by, some rewritten to keep a mark."""
    found: dict[str, Any] = {}
    waiting = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name in found or node.get_type_name() in ENDS or not node.get_output_element_type(0).is_real():
            continue
        found[name] = node
        waiting += [source.get_source_output().get_node() for source in node.inputs()]
    for node in found.values():
        if node.get_type_name() == "Unsqueeze":
            _reshape(node)
    return set(found)


def _reshape(node: Any) -> None:
    """Put a Reshape in the place of an Unsqueeze, which OpenVINO would do itself and lose the mark."""
    shape = [size.get_length() if size.is_static else -1 for size in node.get_output_partial_shape(0)]
    if shape.count(-1) > 1:
        return
    name, source = node.get_friendly_name(), node.input_value(0)
    new = load_openvino().opset13.reshape(source, np.array(shape, np.int64), False)
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))
    node.set_friendly_name(f"{name}/replaced")
    new.set_friendly_name(name)
