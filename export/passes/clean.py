"""What an exported graph need not tell."""

from __future__ import annotations

import onnx_ir as ir


def clean(model: ir.Model) -> None:
    """Remove what the exporter notes beside the graph: stack traces with local paths, names of Python modules."""
    border = {*model.graph.inputs, *model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for value in border | set(model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in border:
                value.shape = value.type = None  # any reader infers them; here they have the tracer's own size names
