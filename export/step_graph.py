"""The sampler's step as an ONNX graph: one row of a step table, applied."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from ..engines.bundle import Precision, TensorInfo
from ..runtime.sampling.step_table import STEP_INPUTS, StepOption

__all__ = ["step_graph"]

OPSET = 20
IR_VERSION = 9
BISECTIONS = 30
"""Halvings of an interval from 0 to the largest bound: what is left of 64 is less than half of float32's last digit at
1, the least bound."""


def step_graph(precision: Precision, channels: int, options: Collection[StepOption] = ()) -> ModelProto:
    """Return the step graph for a network of the given precision and number of latent channels.

    B images, G branches, R = B G network rows, T table rows, H history slots, P = 1 + H lines, K = 3 + G + H columns,
    D drawn noise tensors. Table and index inputs are what the runtime packs; `original` holds the
    latents of a given image and their noise, which replace the result where `mask` is false. In words:

        latents', history' = weights[row] @ [latents, predictions, noise, clipped, history]
        row' = next_rows[row]; model_input' = input_scales[row'] latents'; timestep' = timesteps[row']

    Everything but `prediction` and `next_model_input` is fp32. Products are summed by Mul and ReduceSum, not MatMul:
    backends may run a MatMul in TF32, which is too coarse for latents. No output may share memory with an input.

    With learned variance the prediction has 2 C channels, and the second half for an image's last branch says what the
    noise is multiplied by. With dynamic thresholding the clipped column is clipped to a quantile and divided by it.
    """
    learned, dynamic = ("learned variance" in options), ("dynamic thresholding" in options)
    network = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    image: list[str | int] = [channels, "h", "w"]
    inputs = [
        value("latents", ["B", *image]),
        value("history", ["B", "H", *image]),
        value("prediction", ["R", 2 * channels if learned else channels, "h", "w"], network),
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
    inputs += [
        value(name, ["T", 1, 1, 1, 1]) for option in STEP_INPUTS if option in options for name in STEP_INPUTS[option]
    ]
    outputs = [
        value("next_latents", ["B", *image]),
        value("next_history", ["B", "H", *image]),
        value("next_model_input", ["R", *image], network),
        value("next_timestep", ["R"]),
        value("next_row", ["B"], TensorProto.INT64),
    ]
    constants = {"zero": 0, "axis1": [1], "axis2": [2], "from1": [1], "to_end": [2**31 - 1]}
    numbers: dict[str, float] = {"low": -1, "high": 1}
    if learned:
        constants |= {"from0": [0], "half_way": [channels], "last": [-1]}
    if dynamic:
        constants |= {"of_image": [2, 3, 4]}
        del numbers["low"]
        numbers |= {"nothing": 0, "half": 0.5}
    initializers = [numpy_helper.from_array(np.array(number, np.int64), name) for name, number in constants.items()]
    initializers += [numpy_helper.from_array(np.array(number, np.float32), name) for name, number in numbers.items()]
    graph = helper.make_graph(nodes(network, learned, dynamic), "step", inputs, outputs, initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="latentrt"
    )
    checker.check_model(model, full_check=True)
    return model


def nodes(network: int, learned: bool, dynamic: bool) -> list[NodeProto]:
    """Return the nodes in execution order."""
    half = network == TensorProto.FLOAT16
    predictions = "whole_predictions" if learned else "predictions"
    return [
        # the basis [B, K, C, h, w]
        node("Gather", ["prediction", "rows_of_image"], f"{predictions}_raw" if half else predictions),
        *([node("Cast", [f"{predictions}_raw"], predictions, to=TensorProto.FLOAT)] if half else []),
        *([node("Slice", [predictions, "from0", "half_way", "axis2"], "predictions")] if learned else []),
        node("Unsqueeze", ["latents", "axis1"], "latents_column"),
        node("Concat", ["latents_column", "predictions"], "state", axis=1),
        node("Gather", ["noise_index", "row"], "noise_slot"),
        node("GatherND", ["noise", "noise_slot"], "drawn" if learned else "noise_column", batch_dims=1),
        *(learned_noise() if learned else []),
        node("Gather", ["clip_weights", "row"], "clip_row"),
        node("Mul", ["state", "clip_row"], "clip_terms"),
        node("ReduceSum", ["clip_terms", "axis1"], "clip_form"),
        *(thresholded() if dynamic else [node("Clip", ["clip_form", "low", "high"], "clipped_column")]),
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


def learned_noise() -> list[NodeProto]:
    """Return the nodes of the noise column: exp(level + slope * what the last branch says) * noise."""
    return [
        node("Slice", ["whole_predictions", "half_way", "to_end", "axis2"], "variances"),
        node("Slice", ["variances", "last", "to_end", "axis1"], "variance"),
        node("Gather", ["log_deviation_slopes", "row"], "slope"),
        node("Mul", ["variance", "slope"], "above_level"),
        node("Gather", ["log_deviations", "row"], "level"),
        node("Add", ["above_level", "level"], "log_deviation"),
        node("Exp", ["log_deviation"], "deviation"),
        node("Mul", ["drawn", "deviation"], "noise_column"),
    ]


def thresholded() -> list[NodeProto]:
    """Return the nodes of the clipped column: clip(form, -s, s) / s, where s is a quantile of |form| in its bounds.

    The quantile lies between two neighbours in the sorted values, as far as its rank says (torch's and numpy's
    "linear"). The lower one is found by halving an interval, which needs sums alone, where sorting is limited in size:
    it is right to the last digit unless two values are closer than what is left of the interval. The least value above
    it is the other one.
    """

    def count(bound: str, name: str) -> list[NodeProto]:
        return [
            node("LessOrEqual", ["sizes", bound], f"{name}_within"),
            node("Cast", [f"{name}_within"], f"{name}_ones", to=TensorProto.FLOAT),
            node("ReduceSum", [f"{name}_ones", "of_image"], f"{name}_count"),
        ]

    found = [
        node("Abs", ["clip_form"], "sizes"),
        node("ReduceMax", ["sizes", "of_image"], "biggest"),
        *count("biggest", "whole"),
        # the rank of the quantile, from 0, and how many values are up to the one below it
        node("Gather", ["quantiles", "row"], "quantile_row"),
        node("Sub", ["whole_count", "high"], "last_rank"),
        node("Mul", ["quantile_row", "last_rank"], "rank"),
        node("Floor", ["rank"], "rank_below"),
        node("Sub", ["rank", "rank_below"], "share"),
        node("Add", ["rank_below", "high"], "needed"),
        node("Gather", ["largest", "row"], "most"),
    ]
    lower, upper = "nothing", "most"
    for number in range(BISECTIONS):
        found += [
            node("Add", [lower, upper], f"both_{number}"),
            node("Mul", [f"both_{number}", "half"], f"middle_{number}"),
            *count(f"middle_{number}", f"at_{number}"),
            node("GreaterOrEqual", [f"at_{number}_count", "needed"], f"enough_{number}"),
            node("Where", [f"enough_{number}", lower, f"middle_{number}"], f"lower_{number}"),
            node("Where", [f"enough_{number}", f"middle_{number}", upper], f"upper_{number}"),
        ]
        lower, upper = f"lower_{number}", f"upper_{number}"
    return [
        *found,
        *count(upper, "found"),
        node("Where", ["found_within", "sizes", "nothing"], "sizes_within"),
        node("ReduceMax", ["sizes_within", "of_image"], "size_below"),
        node("Where", ["found_within", "biggest", "sizes"], "sizes_beyond"),
        node("ReduceMin", ["sizes_beyond", "of_image"], "size_beyond"),
        node("Greater", ["found_count", "needed"], "equal_sizes"),
        node("Where", ["equal_sizes", "size_below", "size_beyond"], "size_above"),
        node("Sub", ["size_above", "size_below"], "gap"),
        node("Mul", ["gap", "share"], "part_of_gap"),
        node("Add", ["size_below", "part_of_gap"], "between"),
        node("GreaterOrEqual", ["found_count", "needed"], "in_reach"),
        node("Where", ["in_reach", "between", "most"], "quantile"),
        node("Max", ["quantile", "high"], "one_at_least"),
        node("Min", ["one_at_least", "most"], "bound"),
        node("Neg", ["bound"], "lower_bound"),
        node("Min", ["clip_form", "bound"], "cut_above"),
        node("Max", ["cut_above", "lower_bound"], "cut"),
        node("Div", ["cut", "bound"], "clipped_column"),
    ]


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    """Return a node named after its output."""
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def value(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    """Return a typed graph input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def tensor_info(value: ValueInfoProto) -> TensorInfo:
    """Return what a manifest says of a graph input or output."""
    tensor = value.type.tensor_type
    dtype: Any = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(name=value.name, dtype=dtype, shape=tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))
