"""Numbers of a request that graphs read beside token ids, as the bundle's manifest lists them."""

from __future__ import annotations

import numpy as np

from ...engines.bundle import Bundle
from ...engines.device import Array
from ..request import GenerationRequest


def number_inputs(bundle: Bundle, request: GenerationRequest, rows: int) -> dict[str, Array]:
    """Return the manifest's inputs of kind `numbers` for a complete request, each [R, N], by graph input."""
    types = {spec.name: spec.dtype for graph in bundle.manifest.graphs for spec in graph.inputs}
    arrays = {}
    for info in bundle.manifest.inputs:
        values = [getattr(request, value) if isinstance(value, str) else value for value in info.values]
        arrays[info.name] = np.tile(np.array(values, types[info.name]), (rows, 1))
    return arrays
