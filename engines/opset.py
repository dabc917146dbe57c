"""Graphs for parsers that are older than the opset that they were written in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import EngineError

if TYPE_CHECKING:
    from onnx import ModelProto


def lower_opset(model: ModelProto, version: int) -> None:
    """Declare a graph in an older opset of ONNX, which means the same.

    An operator may have been defined anew since then for more types alone; one whose inputs, outputs or attributes are
    others, or that is not there at all, raises `EngineError` with its name.
    """
    from onnx import checker, helper

    now = next((entry for entry in model.opset_import if not entry.domain), None)
    if now is None or now.version <= version:
        return
    for kind in sorted({node.op_type for node in model.graph.node if not node.domain}):
        if _signature(kind, now.version) != _signature(kind, version):
            raise EngineError(f"operator {kind} of opset {now.version} has no equal in opset {version}")
    now.version = version
    model.ir_version = min(model.ir_version, helper.find_min_ir_version_for([now]))
    try:
        checker.check_model(model)
    except checker.ValidationError as error:
        raise EngineError(f"the graph cannot be written in opset {version} ({str(error).splitlines()[0]})") from error


def _signature(kind: str, version: int) -> Any:
    """Return what a node of an operator says, types apart; None for an operator that the opset does not have."""
    from onnx import defs

    try:
        schema = defs.get_schema(kind, version, "")
    except defs.SchemaError:
        return None
    tensors = [[(each.name, each.option) for each in side] for side in (schema.inputs, schema.outputs)]
    attributes = {n: (a.type, a.required, a.default_value.SerializeToString()) for n, a in schema.attributes.items()}
    return tensors, attributes
