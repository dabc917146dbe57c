"""A denoiser with 8-bit marks: calibrated by Model Optimizer, measured in part, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ...engines.bundle import Bundle, EightBits, GraphInfo, Quantization, ReferenceInfo
from ...engines.bundle.references import read_reference, write_reference
from ...engines.device import Array
from ...engines.errors import ExportError, reason
from ...engines.progress import Progress
from ...engines.selfcheck import relative_error
from ..passes.save import save_model
from . import calibrate
from .environment import run
from .layers import Layer, fold, without
from .record import Call, Recording
from .sweep import sensitive

SWEPT = 3
"""Calls that the sweep measures on."""


class Marked:
    """A denoiser in the folder `work`, with 8-bit marks around the layers once it is calibrated."""

    def __init__(self, bundle: Bundle, graph: GraphInfo, model: onnx.ModelProto, work: Path) -> None:
        """Copy the graph: Model Optimizer writes over what it reads."""
        self._bundle, self._graph, self._work = bundle, graph, work
        self._model = model
        for name in graph.files[1:]:
            shutil.copyfile(bundle.file(name), work / Path(name).name)
        self._file = work / "plain.onnx"
        onnx.save(model, self._file)
        self._measured = 0
        self._nodes: set[str] = set()  # that read 8 bits

    def quantized(
        self,
        folder: Path,
        python: Path,
        precision: EightBits,
        layers: Sequence[Layer],
        kept: Collection[Layer],
        recordings: Sequence[Recording],
        tries: int,
        progress: Progress,
    ) -> GraphInfo:
        """Write the graph, all its layers but `kept` and those that lose most in 8 bits, and return its entry.

        The latter are found in `tries` measurements. What the entry says of the loss is to be measured. Raises
        `ExportError` where the program fails.
        """
        calls = [call for recording in recordings for call in recording.calls]
        progress("calibrating", 0, 1)
        version = self._calibrate(python, precision, calls, [layer.node for layer in layers if layer not in kept])
        candidates = [layer for layer in layers if layer not in kept and layer.node in self._nodes]
        if not candidates:
            raise ExportError(f"Model Optimizer quantized no layer of graph {self._graph.name}: keep fewer of them")
        some = [each.calls[number % len(each.calls)] for number, each in enumerate(recordings[:SWEPT])]
        costly = sensitive(candidates, lambda group: self._error(group, some, tries, progress), tries)
        chosen = [layer for layer in candidates if layer not in costly]
        files = self._write(folder, chosen)
        quantization = Quantization(
            precision=precision,
            layers=len(chosen),
            kept=tuple(layer.name for layer in layers if layer not in chosen),
            tool=f"nvidia-modelopt {version}",
            samples=len(calls),
            relative_error=0.0,
            psnr=None,
        )
        references = tuple(self._reference(reference, folder) for reference in self._graph.references)
        return self._graph.model_copy(update={"files": files, "references": references, "quantization": quantization})

    def _calibrate(self, python: Path, precision: EightBits, calls: Sequence[Call], nodes: Sequence[str]) -> str:
        """Have Model Optimizer mark the nodes of these names and return its version."""
        arrays = {
            f"{number}/{spec.name}": call[spec.name] for number, call in enumerate(calls) for spec in self._graph.inputs
        }
        np.savez(self._work / "calls.npz", **arrays)  # type: ignore[arg-type]
        output = self._work / "marked.onnx"
        request = {
            "graph": str(self._file),
            "calls": str(self._work / "calls.npz"),
            "nodes": list(nodes),
            "precision": precision,
            "output": str(output),
        }
        (self._work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        said = run([str(python), calibrate.__file__, str(self._work / "request.json")], "Model Optimizer")
        try:
            version = str(json.loads(said[-1])["nvidia-modelopt"])
            self._model = onnx.load(output, load_external_data=False)
        except Exception as error:  # whatever ran under that name
            raise ExportError(
                f"{python} wrote no quantized graph ({reason(error)}): give a Python with nvidia-modelopt"
            ) from error
        marks = {name for node in self._model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        self._nodes = {node.name for node in self._model.graph.node if not marks.isdisjoint(node.input)}
        return version

    def _error(self, group: Sequence[Layer], calls: Sequence[Call], tries: int, progress: Progress) -> float:
        """Return the relative error of the predictions with these layers alone in 8 bits."""
        self._measured += 1
        progress("looking for the layers that lose most", self._measured, tries)
        alone = without(self._model, self._nodes - {layer.node for layer in group})
        file = self._work / "alone.onnx"
        onnx.save(alone, file)
        session = _session(file)
        return error_of([(_run(session, self._graph, call), call) for call in calls])

    def _write(self, folder: Path, layers: Iterable[Layer]) -> tuple[str, ...]:
        """Write the graph with these layers in 8 bits and return the names of its files."""
        model = without(self._model, self._nodes - {layer.node for layer in layers})
        fold(model, self._work)
        final = ir.from_proto(model)
        ir.external_data.set_base_dir(final.graph, self._work)
        return tuple(file.name for file in save_model(final, folder / f"{self._graph.name}.onnx"))

    def _reference(self, reference: ReferenceInfo, folder: Path) -> ReferenceInfo:
        """Write what the finished graph gives for the inputs of the bundle's reference rows."""
        rows = read_reference(self._bundle, self._graph, reference)
        given = {spec.name: rows[spec.name] for spec in self._graph.inputs}
        outputs = _run(_session(folder / f"{self._graph.name}.onnx"), self._graph, given)
        specs = self._graph.inputs + self._graph.outputs
        return write_reference(folder, Path(reference.file).stem, specs, given | outputs)


def _session(file: Path) -> Any:
    """Return a session that computes a graph as it is written, node by node."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ExportError(f"the quantized graph cannot be run ({reason(error)})") from error


def _run(session: Any, graph: GraphInfo, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = [spec.name for spec in graph.outputs]
    values = session.run(names, {spec.name: inputs[spec.name] for spec in graph.inputs})
    return dict(zip(names, values, strict=True))


def error_of(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> float:
    """Return the relative error of all predictions together."""
    values, expected = zip(*((a["prediction"], b["prediction"]) for a, b in pairs), strict=True)
    return relative_error(np.concatenate(values), np.concatenate(expected))
