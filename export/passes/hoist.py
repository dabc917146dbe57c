"""A denoiser taken apart by what its nodes depend on, so that steps compute nothing twice.

What reads the prompt alone (keys and values of cross-attention, texts in a transformer's width) runs once for a
request. What reads the timestep, with or without numbers of the prompt (time embeddings, their projections, adaptive
norms), runs once for all timesteps of a request, and each step picks its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from onnx_ir.tape import Tape

from ...runtime.loop.hoisted import MODULATION, MODULATIONS, ROW_TIMESTEPS
from .cut import Cut

STEPS = 28
"""Timesteps of a usual request: as many rows are kept of what depends on them."""


@dataclass(frozen=True)
class Parts:
    """What became of a denoiser: None where nothing is worth keeping."""

    denoiser: ir.Model
    """The rest, which reads what is kept: `prompt_0`, … and `modulation` [R, F]."""
    prompt: ir.Model | None
    """Writes `prompt_0`, …, [R, …] each."""
    schedule: ir.Model | None
    """`row_timesteps` [R, T] to `modulations` [R, T, F], all that depends on a timestep side by side."""


def hoist(model: ir.Model, usual: Mapping[str, int], steps: int = STEPS) -> Parts:
    """Take out of a denoiser what need not run in every step; the model itself stays as it is.

    A product with weights leaves the loop where the weights are at least as many numbers as what is kept of the
    product for one row: of the prompt with its `usual` tokens, of timesteps for `steps` of them. All that it depends on
    goes with it, and what follows as long as no more numbers are kept for it. Inputs have the sizes of the contract as
    their shapes.
    """
    ShapeInferencePass()(model)
    cut = Cut(model.graph, usual, steps)
    kept, read = cut.kept()
    of_prompt = [value for value in kept if "timestep" not in cut.reads[value]]
    of_time = [value for value in kept if "timestep" in cut.reads[value]]
    return Parts(
        _rest(model, [*read, *of_prompt], of_prompt, of_time),
        _of_prompt(model, cut.inputs_of(of_prompt), of_prompt) if of_prompt else None,
        _of_time(model, cut.inputs_of(of_time), of_time) if of_time else None,
    )


def _rest(
    model: ir.Model, read: Sequence[ir.Value], of_prompt: Sequence[ir.Value], of_time: Sequence[ir.Value]
) -> ir.Model:
    """Return the denoiser that reads what is kept."""
    graph = ir.convenience.extract(model.graph, [*read, *of_time], model.graph.outputs)
    inputs, tape = list(graph.inputs), Tape()
    for number, value in enumerate(inputs[len(read) - len(of_prompt) : len(read)]):
        _cast_inside(value, tape)
        value.name = _name(number)
    if of_time:
        pieces = inputs[len(read) :]
        widths = [_width(piece) for piece in pieces]
        whole = ir.val(MODULATION, _border(pieces[0].dtype), ["R", sum(widths)])
        del graph.inputs[len(read) :]
        graph.inputs.append(whole)
        inside = whole if whole.dtype == pieces[0].dtype else tape.op("Cast", [whole], {"to": pieces[0].dtype})
        parts: Sequence[ir.Value] = [inside]
        if len(pieces) > 1:
            sizes = tape.op("Constant", [], {"value": ir.tensor(np.array(widths, np.int64))})  # never in a file beside
            parts = tape.op_multi_out("Split", [inside, sizes], {"axis": 1}, num_outputs=len(pieces))
        for piece, part in zip(pieces, parts, strict=True):
            found = part
            if len(piece.shape or ()) > 2:
                found = tape.op("Reshape", [part, _sizes(tape, [0, *list(piece.shape or ())[1:]])])  # type: ignore[list-item]
            piece.replace_all_uses_with(found, replace_graph_outputs=True)
    rest = _model(model, graph, before=tape)
    _drop_inputs_for_sizes(graph)
    return rest


def _drop_inputs_for_sizes(graph: ir.Graph) -> None:
    """Take sizes from inputs that are needed anyway, and drop those that nothing else was read of."""
    for value in list(graph.inputs):
        users = [use.node for use in value.uses()]
        axes = [node.attributes.get_int("start", 0) for node in users if node.op_type == "Shape"]
        if len(axes) < len(users) or any(
            n.attributes.get_int("end", -1) != a + 1 for n, a in zip(users, axes, strict=True)
        ):
            continue
        others = {
            str(size): (other, axis)
            for other in reversed(graph.inputs)
            for axis, size in enumerate(other.shape or ())
            if other is not value
        }
        wanted = [str((value.shape or ())[axis]) for axis in axes]
        if not all(size in others for size in wanted):
            continue
        for node, size in zip(users, wanted, strict=True):
            other, axis = others[size]
            node.replace_input_with(0, other)
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64("start", axis),
                ir.AttrInt64("end", axis + 1),
            )
        graph.inputs.remove(value)


def _of_prompt(model: ir.Model, read: Sequence[ir.Value], kept: Sequence[ir.Value]) -> ir.Model:
    """Return the graph that computes what is kept of the prompt."""
    graph, tape = ir.convenience.extract(model.graph, read, kept), Tape()
    for number, value in enumerate(list(graph.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            shape, value = value.shape, tape.op("Cast", [value], {"to": ir.DataType.FLOAT})
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), shape
            graph.outputs[number] = value
        value.name = _name(number)
    return _model(model, graph, after=tape)


def _of_time(model: ir.Model, read: Sequence[ir.Value], kept: Sequence[ir.Value]) -> ir.Model:
    """Return the graph that computes what is kept of timesteps: its rows are R·T inside, row by row."""
    graph = ir.convenience.extract(model.graph, read, kept)
    before, after = Tape(), Tape()
    timesteps = ir.val(ROW_TIMESTEPS, ir.DataType.FLOAT, ["R", "T"])
    rows_and_times = before.op("Shape", [timesteps])
    for number, value in enumerate(list(graph.inputs)):
        if value.name == "timestep":
            graph.inputs[number] = timesteps
            value.replace_all_uses_with(before.op("Reshape", [timesteps, _sizes(before, [-1])]))
            continue
        own, users = list(value.shape or ())[1:], list(value.uses())
        shape = before.op("Concat", [rows_and_times, _sizes(before, own)], {"axis": 0})  # type: ignore[arg-type]
        each = before.op("Unsqueeze", [value, _sizes(before, [1])])
        repeated = before.op("Reshape", [before.op("Expand", [each, shape]), _sizes(before, [-1, *own])])  # type: ignore[list-item]
        for use in users:
            use.node.replace_input_with(use.idx, repeated)
    pieces = [
        value if len(value.shape or ()) == 2 else after.op("Reshape", [value, _sizes(after, [0, -1])])
        for value in graph.outputs
    ]
    width, inside = sum(map(_width, kept)), kept[0].dtype
    whole = after.op("Concat", pieces, {"axis": 1}) if len(pieces) > 1 else pieces[0]
    shape = after.op("Concat", [rows_and_times, _sizes(after, [width])], {"axis": 0})
    whole = after.op("Reshape", [whole, shape])
    if _border(inside) != inside:
        whole = after.op("Cast", [whole], {"to": _border(inside)})
    whole.name, whole.type = MODULATIONS, ir.TensorType(_border(inside))
    whole.shape = ir.Shape(["R", "T", width])
    graph.outputs[:] = [whole]
    return _model(model, graph, before, after)


def _cast_inside(value: ir.Value, tape: Tape) -> None:
    """Let an input that is bfloat16 inside come as float32."""
    if value.dtype == ir.DataType.BFLOAT16:
        users = list(value.uses())
        inside = tape.op("Cast", [value], {"to": ir.DataType.BFLOAT16})
        for use in users:
            use.node.replace_input_with(use.idx, inside)
        value.type = ir.TensorType(ir.DataType.FLOAT)  # clones of a value share its type


def _model(source: ir.Model, graph: ir.Graph, before: Tape | None = None, after: Tape | None = None) -> ir.Model:
    """Return a model of a graph with some nodes more at its beginning and its end."""
    for tape in (before, after):
        for value in tape.initializers if tape else ():
            graph.register_initializer(value)
    if before and before.nodes:
        graph.insert_before(graph[0], before.nodes)
    if after and after.nodes:
        graph.extend(after.nodes)
    return ir.Model(graph, ir_version=source.ir_version, producer_name=source.producer_name)


def _sizes(tape: Tape, sizes: Sequence[int]) -> ir.Value:
    """Return a constant of whole numbers, the same one for the same numbers."""
    name = "sizes." + ".".join(map(str, sizes))
    known = next((value for value in tape.initializers if value.name == name), None)
    return known or tape.initializer(ir.tensor(np.array(sizes, np.int64)), name)


def _width(value: ir.Value) -> int:
    return math.prod(list(value.shape or ())[1:])  # type: ignore[arg-type]


def _border(dtype: ir.DataType | None) -> ir.DataType:
    """Return the element type at a graph's border."""
    assert dtype is not None
    return ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype


def _name(number: int) -> str:
    return f"prompt_{number}"
