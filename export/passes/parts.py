"""Networks written as graphs: whole, or a denoiser as the parts of it that run once for a request and in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, checker, helper, numpy_helper, save

from ...engines.bundle import GraphInfo, Precision, ReferenceInfo, Stage, TensorInfo
from ...engines.bundle.references import write_reference
from ...runtime.loop.hoisted import MODULATION, MODULATIONS, ROW_TIMESTEPS, at_one_step
from ..graph import Graph
from ..onnx_writer import OPSET
from ..parity import LARGE_ROW, ROWS, Case
from ..pieces import run_in_pieces
from ..step_graph import IR_VERSION, node, tensor_info, value
from ..step_graph import OPSET as OWN_OPSET
from .clean import clean
from .hoist import hoist
from .save import save_model

Arrays = dict[str, np.ndarray]


def write_whole(graph: Graph, model: ir.Model, folder: Path, precision: Precision) -> list[GraphInfo]:
    """Write a network as one graph; it has no references yet."""
    files = save_model(model, folder / f"{graph.name}.onnx")
    return [
        GraphInfo(
            name=graph.name,
            stage=graph.stage,
            files=tuple(file.name for file in files),
            inputs=graph.inputs,
            outputs=graph.outputs,
            opset=OPSET,
            precision=precision,
            limits=dict(graph.limits),
        )
    ]


def write_parts(graph: Graph, model: ir.Model, folder: Path, precision: Precision) -> list[GraphInfo]:
    """Take a denoiser apart and write its parts, in the order in which they run; they have no references yet."""
    parts = hoist(model, graph.usual)
    each: list[tuple[str, Stage, ir.Model | None]] = [
        ("prompt", "request", parts.prompt),
        ("schedule", "request", parts.schedule),
        (graph.name, graph.stage, parts.denoiser),
    ]
    infos = []
    for name, stage, part in each:
        if part is None:
            continue
        clean(part)
        infos.append(_written(graph, name, stage, part, folder, precision))
        if name == "schedule":
            infos.append(_write_pick(infos[-1].outputs[0], folder))
    return infos


def _written(graph: Graph, name: str, stage: Stage, part: ir.Model, folder: Path, precision: Precision) -> GraphInfo:
    known = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    inputs, outputs = (
        tuple(known.get(str(v.name)) or tensor_info(ir.to_proto(v)) for v in values)
        for values in (part.graph.inputs, part.graph.outputs)
    )
    limits = {**graph.limits, ROW_TIMESTEPS: graph.limits.get("timestep", 1000.0)}
    return GraphInfo(
        name=name,
        stage=stage,
        files=tuple(file.name for file in save_model(part, folder / f"{name}.onnx")),
        inputs=inputs,
        outputs=outputs,
        opset=OPSET,
        precision=precision,
        limits={spec.name: limits[spec.name] for spec in inputs if spec.name in limits},
    )


def _write_pick(table: TensorInfo, folder: Path) -> GraphInfo:
    """Write the graph that picks the row of a step for every row of the network: all are at the same step."""
    kind, file = helper.np_dtype_to_tensor_dtype(np.dtype(table.dtype)), f"{MODULATION}.onnx"
    rows, times, width = table.shape
    graph = helper.make_graph(
        [node("Gather", ["row", "first"], "step"), node("Gather", [MODULATIONS, "step"], MODULATION, axis=1)],
        MODULATION,
        [value(MODULATIONS, [rows, times, width], kind), value("row", ["B"], TensorProto.INT64)],
        [value(MODULATION, [rows, width], kind)],
        [numpy_helper.from_array(np.array(0, np.int64), "first")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OWN_OPSET)], ir_version=IR_VERSION, producer_name="latentrt"
    )
    checker.check_model(model, full_check=True)
    save(model, folder / file)
    return GraphInfo(
        name=MODULATION,
        stage="step",
        files=(file,),
        inputs=tuple(map(tensor_info, graph.input)),
        outputs=tuple(map(tensor_info, graph.output)),
        opset=OWN_OPSET,
    )


def outputs_of(
    parts: Sequence[GraphInfo], folder: Path, cases: Sequence[Mapping[str, np.ndarray]]
) -> list[list[np.ndarray]]:
    """Run the parts of a network on the CPU, inputs by name, and return the outputs of the last."""
    return [[values[spec.name] for spec in parts[-1].outputs] for values in _run(parts, folder, cases)]


def _run(parts: Sequence[GraphInfo], folder: Path, cases: Sequence[Mapping[str, np.ndarray]]) -> list[Arrays]:
    """Run parts one after the other, of every case its one step, and return all that they read and write, by name."""
    held = [dict(case) for case in cases]
    for values in held if len(parts) > 1 else ():
        values |= at_one_step(values["timestep"])
    for part in parts:
        given = [{spec.name: values[spec.name] for spec in part.inputs} for values in held]
        names = [spec.name for spec in part.outputs]
        for values, outputs in zip(held, run_in_pieces(folder / part.files[0], given), strict=True):
            values.update(zip(names, outputs, strict=True))
    return held


def with_references(parts: Sequence[GraphInfo], folder: Path, kinds: Mapping[str, Case]) -> list[GraphInfo]:
    """Write the first rows of cases beside a network's parts, by the end of a file's name, and return the parts so.

    What the last part gives is the module's. What lies between the parts is what the CPU computes of them.
    """
    inputs = [{name: tensor.numpy() for name, tensor in given.items()} for given, _ in kinds.values()]
    found = _run(parts[:-1], folder, inputs) if parts[1:] else inputs
    for values, (_, outputs) in zip(found, kinds.values(), strict=True):
        values.update(zip([spec.name for spec in parts[-1].outputs], outputs, strict=True))
    written = []
    for part in parts:
        specs, references = part.inputs + part.outputs, list[ReferenceInfo]()
        for kind, values in zip(kinds if part.name != MODULATION else (), found, strict=False):
            large = sum(values[spec.name][:1].nbytes for spec in specs) > LARGE_ROW
            rows = {spec.name: values[spec.name][: 1 if large and parts[1:] else ROWS] for spec in specs}
            reference = write_reference(folder, f"{part.name}-{kind}", specs, rows)
            if reference.sizes in [each.sizes for each in references]:  # nothing of it is of latents
                (folder / reference.file).unlink()
            else:
                references.append(reference)
        written.append(part.model_copy(update={"references": tuple(references)}))
    return written
