"""The input shapes of every graph of a request: a workspace wired on the host, with engines that only take notes."""

from __future__ import annotations

from collections.abc import Mapping

from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Array, Tensor
from ...engines.engine import BoundEngine, Shapes
from ...engines.host import HostDevice
from .decoding import WHOLE, Decoding
from .workspace import Workspace


class Notes:
    """An engine that runs nothing: it stands in where only shapes are wanted."""

    nbytes = 0

    def __init__(self, graph: GraphInfo) -> None:
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundEngine:
        """Take what there is."""
        return self  # type: ignore[return-value]

    def close(self) -> None:
        """Do nothing."""


def shapes_of_rows(denoiser: GraphInfo, shapes: Shapes, rows: int) -> Shapes:
    """Return a denoiser's input shapes where it runs so many rows alone."""
    symbol = next(spec.shape[0] for spec in denoiser.inputs if spec.name == "model_input")
    return {
        spec.name: (rows, *shapes[spec.name][1:]) if spec.shape[:1] == (symbol,) else shapes[spec.name]
        for spec in denoiser.inputs
    }


def wired_shapes(
    bundle: Bundle, inputs: Mapping[str, Array], arrays: Mapping[str, Array], decoding: Decoding = WHOLE
) -> dict[str, Shapes]:
    """Return the input shapes of every graph that a workspace of these arrays opens, by graph, and of its tiles."""
    shapes: dict[str, Shapes] = {}

    def open_engine(graph: GraphInfo, wanted: Shapes) -> Notes:
        shapes[graph.name] = {name: tuple(shape) for name, shape in wanted.items()}
        return Notes(graph)

    Workspace(HostDevice(), bundle, open_engine, inputs, arrays, decoding=decoding).close()
    if decoding.tile is not None:
        shapes[decoding.graph] = {"latents": (1, arrays["latents"].shape[1], *decoding.tile)}
    return shapes
