"""Graphs that run for one image or one row at a time, beside the loop: prompt encoders and the decoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import numpy as np

from ...engines.bundle import GraphInfo
from ...engines.device import Array
from ..loop import hoisted
from ..loop.decoding import Decoding, decoded_in_tiles, shown_by
from ..loop.denoise import OpenEngine
from ..loop.session import Session
from ..loop.workspace import BoundGraph

KEPT_BINDINGS = 8
"""Shapes of graphs that stay bound for the images of one size."""


class Encoder:
    """Turns the inputs of network rows into conditioning, row by row, so that a row is the same in every company."""

    def __init__(self, session: Session, open_engine: OpenEngine) -> None:
        """Bind nothing yet; rows of prompts are kept in the session: most requests have the same few negative ones."""
        self._device, self._stream, self._open = session.backend.device, session.stream, open_engine
        self._bundle, self._prompts = session.bundle, session.prompts
        manifest = self._bundle.manifest
        self._graphs = [graph for graph in manifest.graphs if graph.stage == "prompt"]
        self._of_request = [g for g in hoisted.of_request(manifest) if not hoisted.reads_timesteps(g)]
        self._read = [spec.name for spec in hoisted.row_conditioning(manifest)]
        self._bound: OrderedDict[tuple[str, tuple[tuple[int, ...], ...]], BoundGraph] = OrderedDict()

    def conditioning(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the denoiser reads beside latents and timestep [n, ...], for inputs of n rows."""
        count = len(next(iter(inputs.values())))
        rows = [self._row({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in self._read}

    def _row(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = dict(inputs)
        if (known := self._prompts.get(inputs)) is not None:
            tensors |= known
        else:
            for graph in self._graphs:
                if not all(spec.name in tensors for spec in graph.outputs):
                    tensors |= self.run(graph, {spec.name: tensors[spec.name] for spec in graph.inputs})
            self._prompts.put(inputs, tensors)
        for graph in self._of_request:
            tensors |= self.run(graph, {spec.name: tensors[spec.name] for spec in graph.inputs})
        return {name: tensors[name] for name in self._read}

    def decode(self, latents: Array, decoding: Decoding) -> dict[str, Array]:
        """Return a decoder's outputs for the latents of one image [1, C, h, w]."""
        graph = self._bundle.graph(decoding.graph)

        def decode(latents: Array) -> dict[str, Array]:
            return self.run(graph, {"latents": latents})

        return decode(latents) if decoding.tile is None else decoded_in_tiles(latents, decoding.tile, decode)

    def preview(self, latents: Array, decoding: Decoding) -> Array:
        """Return the picture [H, W, 3] of latents [1, C, h, w] on their way, by the tiny decoder where there is one."""
        picture: Array = self.decode(latents, shown_by(self._bundle, decoding))["image"][0]
        return picture

    def run(self, graph: GraphInfo, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph on host arrays and return its outputs on the host."""
        key = (graph.name, tuple(array.shape for array in inputs.values()))
        if key not in self._bound:
            engine = self._open(graph, {name: array.shape for name, array in inputs.items()})
            self._bound[key] = BoundGraph(self._device, engine, graph, inputs)
            if len(self._bound) > KEPT_BINDINGS:
                self._bound.popitem(last=False)[1].close()
        self._bound.move_to_end(key)
        return self._bound[key].run(inputs, self._stream)

    def memory(self) -> Iterator[tuple[str, int]]:
        """Yield graphs, several times perhaps, with the bytes of their buffers; on any thread."""
        return ((name, bound.nbytes) for (name, _), bound in list(self._bound.items()))

    def close(self) -> None:
        """Free bindings and memory; calling it again does nothing."""
        with ExitStack() as closing:
            while self._bound:
                closing.callback(self._bound.popitem()[1].close)
