"""From a PyTorch module to an ONNX file: trace, check the symbolic sizes, clean, save."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CheckerPass, RemoveUnusedNodesPass
from onnxscript import opset23 as op

from ..engines.errors import ExportError, reason
from .checkpoints.streamed import Stored, blanked
from .graph import Graph, split_size
from .passes.attention import attention, join_heads
from .passes.clean import clean
from .passes.exact import exact_constants
from .passes.group_norm import group_norm
from .passes.weights import attach, transpose

OPSET = 23
"""The first with `Attention` as one node, which an engine can fuse or expand as it likes."""

TRACE_SIZES = (3, 23, 37)
"""Batch, latent height and latent width while tracing: never 1, which would be taken for a constant, and odd, so that
nothing that holds for even sizes alone goes unnoticed."""

MAX_ROWS = 63
"""Largest batch that one trace is valid for: from 64 on diffusers copies tensors, which changes nothing in ONNX."""

log = logging.getLogger(__name__)


def onnx_model(graph: Graph) -> ir.Model:
    """Trace a graph's module and return it as ONNX, shapes named as in the contract; the module is used up.

    Weights that the module has in files stay there until the model is saved. Raises `ExportError` when tracing fails
    or a size that must be symbolic came out fixed.
    """
    stored = blanked(graph.module)
    try:
        model = _converted(graph, stored, shortcut=True)
    except Exception as error:  # the exporter's errors share no base class
        log.info("graph %s needs the full decomposition (%s)", graph.name, _innermost(error))
        try:
            model = _converted(graph, stored, shortcut=False)
        except Exception as error:
            raise ExportError(f"graph {graph.name} cannot be traced ({_innermost(error)})") from error
    if model.opset_imports[""] != OPSET:
        raise ExportError(f"graph {graph.name} came out in opset {model.opset_imports['']}, not {OPSET}")
    for value, tensor in zip([*model.graph.inputs, *model.graph.outputs], graph.inputs + graph.outputs, strict=True):
        _name_sizes(graph.name, value, tensor.shape)
    clean(model)
    return model


def _converted(graph: Graph, stored: Mapping[int, Stored], *, shortcut: bool) -> ir.Model:
    """Trace and convert a module.

    The exporter's own way is to trace the program a second time to decompose it, which takes as long as the first.
    All it has left to decompose for many networks is `to`: with `shortcut` that gets a translation and the second
    pass is left out. What comes out is refused where an operator's inputs are of several types.
    """
    inputs = graph.random_inputs(graph.sizes(TRACE_SIZES), seed=0)
    with torch.no_grad(), _quiet(), exact_constants():
        program = torch.export.export(graph.module, (), inputs, dynamic_shapes=_dynamic_shapes(graph), strict=False)
        _erase(program.graph)
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
        attach(converted.model, stored)
        transpose(converted.model)
        converted.optimize()
        join_heads(converted.model)
        RemoveUnusedNodesPass()(converted.model)
        if shortcut:
            CheckerPass(full_check=True)(converted.model)
    return converted.model


def _erase(traced: torch.fx.Graph) -> None:
    """Take out of a traced program what is no part of the network's numbers."""
    for node in traced.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        traced.erase_node(node)
    for target in (torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout, torch.ops.aten.to.other):
        for node in traced.find_nodes(op="call_function", target=target):  # a graph knows types, and no devices
            node.target = torch.ops.aten.to.dtype
            node.args, node.kwargs = (node.args[0], node.meta["val"].dtype), {}
    for node in traced.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        source, axis = node.args
        if not _is_one(source.meta["val"].shape[axis]):  # PyTorch leaves the axis then, and ONNX cannot know
            node.replace_all_uses_with(source)
            traced.erase_node(node)
    with suppress(SystemError, KeyError):  # PyTorch's own fails on programs whose last layers nobody reads
        traced.eliminate_dead_code()


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _cast(self: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:
    return op.Cast(self, to=dtype)


def _dynamic_shapes(graph: Graph) -> dict[str, dict[int, Any]]:
    cells: dict[str, Any] = {
        letter: torch.export.Dim(f"{letter}_", min=graph.smallest.get(letter), max=MAX_ROWS if letter in "RB" else None)
        for letter in graph.symbols
    }
    cells |= {
        letter: factor * torch.export.Dim(f"{letter}_", min=-(-graph.smallest.get(letter, 2 * factor) // factor))
        for letter, factor in graph.multiples.items()
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


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


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
