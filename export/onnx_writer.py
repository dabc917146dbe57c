"""From a PyTorch module to an ONNX file: trace, check the symbolic sizes, clean, save."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23 as op

from ..engines.errors import ExportError, reason
from .graph import Graph, split_size
from .passes.attention import set_whole_attention
from .passes.clean import clean
from .passes.group_norm import group_norm

OPSET = 23
"""The first with `Attention` as one node, which an engine can fuse or expand as it likes."""

EXTERNAL_BYTES = 64 << 20
"""Weights above this go to `<graph>.onnx.data`, below they stay in the graph's file."""

TRACE_SIZES = (3, 23, 37)
"""Batch, latent height and latent width while tracing: never 1, which would be taken for a constant, and odd, so that
nothing that holds for even sizes alone goes unnoticed."""

MAX_ROWS = 63
"""Largest batch that one trace is valid for: from 64 on diffusers copies tensors, which changes nothing in ONNX."""

log = logging.getLogger(__name__)


def onnx_model(graph: Graph) -> ir.Model:
    """Trace a graph's module and return it as ONNX, shapes named as in the contract.

    Raises `ExportError` when tracing fails or a size that must be symbolic came out fixed.
    """
    set_whole_attention(graph.module)
    try:
        model = _converted(graph, shortcut=True)
    except Exception as error:  # the exporter's errors share no base class
        log.info("graph %s needs the full decomposition (%s)", graph.name, _innermost(error))
        try:
            model = _converted(graph, shortcut=False)
        except Exception as error:
            raise ExportError(f"graph {graph.name} cannot be traced ({_innermost(error)})") from error
    if model.opset_imports[""] != OPSET:
        raise ExportError(f"graph {graph.name} came out in opset {model.opset_imports['']}, not {OPSET}")
    for value, tensor in zip([*model.graph.inputs, *model.graph.outputs], graph.inputs + graph.outputs, strict=True):
        _name_sizes(graph.name, value, tensor.shape)
    clean(model)
    return model


def save_model(model: ir.Model, file: Path) -> list[Path]:
    """Write an ONNX model and return its files, the external data last when there is any; the model is used up."""
    weights = list(model.graph.initializers.values())
    files = [file]
    if sum(value.const_value.nbytes for value in weights if value.const_value) > EXTERNAL_BYTES:
        files.append(file.with_name(file.name + ".data"))
    ir.save(model, file, external_data=files[1].name if files[1:] else None)
    _forget(weights)
    return files


def _converted(graph: Graph, *, shortcut: bool) -> ir.Model:
    """Trace and convert a module.

    The exporter's own way is to trace the program a second time to decompose it, which takes as long as the first.
    All it has left to decompose for these networks is `to`: with `shortcut` that gets a translation and the second
    pass is left out.
    """
    inputs = graph.random_inputs(graph.sizes(TRACE_SIZES), seed=0)
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph.module, (), inputs, dynamic_shapes=_dynamic_shapes(graph), strict=False)
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        if shortcut:
            program.run_decompositions = lambda *_: program
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            custom_translation_table=TRANSLATIONS | ({torch.ops.aten.to.dtype: _cast} if shortcut else {}),
            verbose=False,
            optimize=False,
        )
        assert converted is not None
        weights = list(converted.model.graph.initializers.values())
        converted.optimize()
    kept = set(converted.model.graph.initializers.values())
    _forget(value for value in weights if value not in kept)
    return converted.model


def _forget(values: Iterable[ir.Value]) -> None:
    """Drop weights that are not needed any more: the optimizer's rules remember the last graph, gigabytes with it."""
    for value in values:
        value.const_value = None


def _cast(self: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:
    return op.Cast(self, to=dtype)


def _dynamic_shapes(graph: Graph) -> dict[str, dict[int, Any]]:
    cells = {
        letter: torch.export.Dim(f"{letter}_", min=graph.smallest.get(letter), max=MAX_ROWS if letter in "RB" else None)
        for letter in graph.symbols
    }
    dims: dict[str, dict[int, Any]] = {}
    for tensor in graph.inputs:
        dims[tensor.name] = {}
        for axis, (factor, letter) in enumerate(map(split_size, tensor.shape)):
            if letter:
                dims[tensor.name][axis] = factor * cells[letter] if factor > 1 else cells[letter]
    return dims


def _name_sizes(graph: str, value: ir.Value, shape: tuple[int | str, ...]) -> None:
    """Write the contract's sizes into an input or output after checking which of its sizes are symbolic."""
    found = list(value.shape or ())
    fits = len(found) == len(shape) and all(
        isinstance(size, ir.SymbolicDim) if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"graph {graph}: tensor {value.name} was traced with shape {found} where {list(shape)} is wanted: "
            "a size that must stay symbolic was fixed, or the checkpoint's config does not fit its family"
        )
    value.shape = ir.Shape(shape)


TRANSLATIONS = {torch.ops.aten.group_norm.default: group_norm}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user; what matters is checked afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _innermost(error: BaseException) -> str:
    """Return the reason of the innermost cause; the exporter wraps it in advice to file a report."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
