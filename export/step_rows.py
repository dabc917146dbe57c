"""Rows of the step graph and what it must give for them, in closed form: it comes from no module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx

from ..engines.bundle import GraphInfo, Precision
from ..engines.bundle.references import write_reference
from ..engines.device import Array
from ..runtime.sampling.step_table import StepOption
from .step_graph import step_graph, tensor_info

__all__ = ["LIMITS", "limits", "step_rows", "write_step_graph"]

LIMITS: Mapping[str, str] = {
    "row": "T",
    "next_rows": "T",
    "noise_index": "D",
    "rows_of_image": "R",
    "image_of_row": "B",
}
"""The index inputs of the step graph and the sizes that they stay below."""

LARGEST = 4.0
"""The largest bound of thresholded values in the rows."""

IMAGES, BRANCHES, ROWS, HISTORY, DRAWS, HEIGHT, WIDTH = 2, 2, 3, 2, 2, 5, 6


def limits(options: Collection[StepOption]) -> dict[str, str | float]:
    """Return what the inputs of a step graph stay below, where they do not take any number."""
    return {**LIMITS, **({"quantiles": 1.0, "largest": LARGEST} if "dynamic thresholding" in options else {})}


def write_step_graph(
    folder: Path, precision: Precision, channels: int, options: Collection[StepOption] = ()
) -> GraphInfo:
    """Write the graph that applies the step table; it comes from no module."""
    model = step_graph(precision, channels, options)
    onnx.save(model, folder / "step.onnx")
    inputs, outputs = tuple(map(tensor_info, model.graph.input)), tuple(map(tensor_info, model.graph.output))
    rows = step_rows(precision, channels, options)
    return GraphInfo(
        name="step",
        stage="step",
        files=("step.onnx",),
        inputs=inputs,
        outputs=outputs,
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        references=(write_reference(folder, "step", inputs + outputs, rows),),
        limits=limits(options),
    )


def step_rows(precision: Precision, channels: int, options: Collection[StepOption] = ()) -> dict[str, Array]:
    """Return inputs of the step graph and its outputs for them, computed in float64 from its docstring's formula."""
    learned, dynamic = "learned variance" in options, "dynamic thresholding" in options
    random = np.random.RandomState(0)  # its numbers are the same in every release of numpy
    images, branches, rows, columns = IMAGES, BRANCHES, ROWS, 3 + BRANCHES + HISTORY

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    picture = (channels, HEIGHT, WIDTH)
    network = np.dtype(np.float16 if precision == "fp16" else np.float32)
    given: dict[str, Array] = {
        "latents": normal(images, *picture),
        "history": normal(images, HISTORY, *picture),
        "prediction": normal(images * branches, 2 * channels if learned else channels, *picture[1:]).astype(network),
        "row": np.array([0, 1]),
        "weights": normal(rows, 1 + HISTORY, columns, 1, 1, 1),
        "clip_weights": normal(rows, 1 + branches, 1, 1, 1),
        "original_weights": normal(rows, 2, 1, 1, 1),
        "input_scales": normal(rows, 1, 1, 1),
        "timesteps": 1000 * random.random_sample(rows).astype(np.float32),
        "next_rows": np.array([1, 2, 0]),
        "noise_index": np.array([1, 0, 1]).reshape(rows, 1, 1),
        "rows_of_image": np.array([[0, 2], [1, 3]]),
        "image_of_row": np.array([0, 1, 0, 1]),
        "noise": normal(images, DRAWS, *picture),
        "original": normal(images, 2, *picture),
        "mask": normal(images, 1, HEIGHT, WIDTH) > 0,
    }
    one_each = (rows, 1, 1, 1, 1)
    if dynamic:  # the first row's bound is a quantile, the second's is fixed
        given["quantiles"] = np.array([0.4, 0, 0.9], np.float32).reshape(one_each)
        given["largest"] = np.array([LARGEST, 1, LARGEST], np.float32).reshape(one_each)
    if learned:
        given |= {name: normal(*one_each) for name in ("log_deviations", "log_deviation_slopes")}
    lines, following = [], given["next_rows"][given["row"]]
    for image, row in enumerate(given["row"]):
        predictions = given["prediction"][given["rows_of_image"][image]].astype(float)
        state = np.stack([given["latents"][image].astype(float), *predictions[:, :channels]])
        form, bound = (given["clip_weights"][row] * state).sum(0), 1.0
        if dynamic:
            bound = np.quantile(np.abs(form), given["quantiles"][row].item()).clip(1, given["largest"][row].item())
        clipped = np.clip(form, -bound, bound) / bound
        noise = given["noise"][image, given["noise_index"][row, 0, 0]]
        if learned:
            slope, level = given["log_deviation_slopes"][row, 0], given["log_deviations"][row, 0]
            noise = noise * np.exp(level + slope * predictions[-1, channels:])
        basis = np.concatenate([state, [noise, clipped], given["history"][image]])
        lines.append((given["weights"][row] * basis).sum(1))
    sampled, kept = np.stack(lines), (given["original"] * given["original_weights"][following].astype(float)).sum(1)
    latents = np.where(given["mask"], sampled[:, 0], kept)
    scaled = latents * given["input_scales"][following]
    return given | {
        "next_latents": latents.astype(np.float32),
        "next_history": sampled[:, 1:].astype(np.float32),
        "next_model_input": scaled[given["image_of_row"]].astype(network),
        "next_timestep": given["timesteps"][following][given["image_of_row"]],
        "next_row": following,
    }
