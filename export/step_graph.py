"""The sampler's step as an ONNX graph: one row of a step table, applied."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from ..engines.bundle import Precision

__all__ = ["step_graph"]

OPSET = 20
IR_VERSION = 9


def step_graph(precision: Precision, channels: int) -> ModelProto:
    """Return the step graph for a network of the given precision and number of latent channels.

    B images, G branches, R = B G network rows, T table rows, H history slots, P = 1 + H lines, K = 3 + G + H columns,
    D drawn noise tensors. Table and index inputs are what the runtime packs; `original` holds the
    latents of a given image and their noise, which replace the result where `mask` is false. In words:

        latents', history' = weights[row] @ [latents, predictions, noise, clipped, history]
        row' = next_rows[row]; model_input' = input_scales[row'] latents'; timestep' = timesteps[row']

    Everything but `prediction` and `next_model_input` is fp32. Products are summed by Mul and ReduceSum, not MatMul:
    backends may run a MatMul in TF32, which is too coarse for latents. No output may share memory with an input.
    """
    network = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    image: list[str | int] = [channels, "h", "w"]
    inputs = [
        value("latents", ["B", *image]),
        value("history", ["B", "H", *image]),
        value("prediction", ["R", *image], network),
        value("row", ["B"], TensorProto.INT64),
        value("weights", ["T", "P", "K", 1, 1, 1]),
        value("clip_weights", ["T", "L", 1, 1, 1]),
        value("original_weights", ["T", 2, 1, 1, 1]),
        value("input_scales", ["T", 1, 1, 1]),
        value("timesteps", ["T"]),
        value("next_rows", ["T"], TensorProto.INT64),
        value("noise_index", ["T", 1, 1], TensorProto.INT64),
        value("rows_of_image", ["B", "G"], TensorProto.INT64),
        value("image_of_row", ["R"], TensorProto.INT64),
        value("noise", ["B", "D", *image]),
        value("original", ["B", 2, *image]),
        value("mask", ["B", 1, "h", "w"], TensorProto.BOOL),
    ]
    outputs = [
        value("next_latents", ["B", *image]),
        value("next_history", ["B", "H", *image]),
        value("next_model_input", ["R", *image], network),
        value("next_timestep", ["R"]),
        value("next_row", ["B"], TensorProto.INT64),
    ]
    constants = {"zero": 0, "axis1": [1], "axis2": [2], "from1": [1], "to_end": [2**31 - 1]}
    initializers = [numpy_helper.from_array(np.array(number, np.int64), name) for name, number in constants.items()]
    initializers += [
        numpy_helper.from_array(np.array(number, np.float32), name) for name, number in (("low", -1), ("high", 1))
    ]
    graph = helper.make_graph(nodes(network), "step", inputs, outputs, initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="latentrt"
    )
    checker.check_model(model, full_check=True)
    return model


def nodes(network: int) -> list[NodeProto]:
    """Return the nodes in execution order."""
    half = network == TensorProto.FLOAT16
    return [
        # the basis [B, K, C, h, w]
        node("Gather", ["prediction", "rows_of_image"], "predictions_raw" if half else "predictions"),
        *([node("Cast", ["predictions_raw"], "predictions", to=TensorProto.FLOAT)] if half else []),
        node("Unsqueeze", ["latents", "axis1"], "latents_column"),
        node("Concat", ["latents_column", "predictions"], "state", axis=1),
        node("Gather", ["noise_index", "row"], "noise_slot"),
        node("GatherND", ["noise", "noise_slot"], "noise_column", batch_dims=1),
        node("Gather", ["clip_weights", "row"], "clip_row"),
        node("Mul", ["state", "clip_row"], "clip_terms"),
        node("ReduceSum", ["clip_terms", "axis1"], "clip_form"),
        node("Clip", ["clip_form", "low", "high"], "clipped_column"),
        node("Concat", ["state", "noise_column", "clipped_column", "history"], "basis", axis=1),
        # one row of the table, applied
        node("Gather", ["weights", "row"], "weight_row"),
        node("Unsqueeze", ["basis", "axis1"], "basis_lines"),
        node("Mul", ["weight_row", "basis_lines"], "terms"),
        node("ReduceSum", ["terms", "axis2"], "lines", keepdims=0),
        node("Gather", ["lines", "zero"], "sampled", axis=1),
        node("Slice", ["lines", "from1", "to_end", "axis1"], "next_history"),
        # the next row: original latents, model input, timestep
        node("Gather", ["next_rows", "row"], "next_row"),
        node("Gather", ["original_weights", "next_row"], "original_row"),
        node("Mul", ["original", "original_row"], "original_terms"),
        node("ReduceSum", ["original_terms", "axis1"], "original_latents", keepdims=0),
        node("Where", ["mask", "sampled", "original_latents"], "next_latents"),
        node("Gather", ["input_scales", "next_row"], "scale"),
        node("Mul", ["next_latents", "scale"], "scaled"),
        *([node("Cast", ["scaled"], "scaled_half", to=TensorProto.FLOAT16)] if half else []),
        node("Gather", ["scaled_half" if half else "scaled", "image_of_row"], "next_model_input"),
        node("Gather", ["timesteps", "next_row"], "timestep"),
        node("Gather", ["timestep", "image_of_row"], "next_timestep"),
    ]


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    """Return a node named after its output."""
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def value(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    """Return a typed graph input or output."""
    return helper.make_tensor_value_info(name, kind, shape)
