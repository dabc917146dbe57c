"""Graphs that run by themselves on host arrays, beside the workspace of a request: encoders, previews, tiles."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

import numpy as np

from ...engines.backends import Backend
from ...engines.bundle import Bundle, Stage
from ...engines.device import Array, Stream
from ..prompt.cache import PromptCache
from .decoding import WHOLE, Decoding, decoded_in_tiles
from .shared import Key, SharedEngines
from .workspace import BoundGraph, Workspace


class SingleGraphs:
    """The part of a session that runs one graph at a time."""

    bundle: Bundle
    backend: Backend
    prompts: PromptCache
    low_memory: bool
    stream: Stream
    _shared: SharedEngines
    _workspaces: OrderedDict[Key, Workspace]
    _wanted: set[Key]

    def release(self, stage: Stage) -> None:
        """Close the engines of a stage."""
        self._shared.release({graph.name for graph in self.bundle.manifest.graphs if graph.stage == stage})

    def decode(self, latents: Array, decoding: Decoding = WHOLE) -> Array:
        """Return the pictures [B, H, W, 3] of latents, on the decoder of a kept workspace where one takes them."""
        if decoding.tile is not None:
            return self.decode_in_tiles(latents, decoding)["image"]
        fewer = not self.backend.dynamic  # a smaller batch costs a static backend a plan, and others less time
        for workspace in () if self.low_memory else reversed(self._workspaces.values()):
            batch, *rest = workspace.loop.latents(0).shape
            fits = len(latents) == batch or (fewer and 0 < len(latents) < batch)
            if workspace.decoding == decoding and latents.shape[1:] == tuple(rest) and fits:
                return workspace.preview(latents, self.stream)
        return self._run(decoding.graph, {"latents": latents}, once=True)["image"]

    def decode_in_tiles(self, latents: Array, decoding: Decoding) -> dict[str, Array]:
        """Return a decoder's outputs for latents [B, C, h, w], image after image and tile after tile."""
        assert decoding.tile is not None
        with self._bound(decoding.graph, {"latents": latents[:1, :, : decoding.tile[0], : decoding.tile[1]]}) as bound:

            def decode(tile: Array) -> dict[str, Array]:
                return bound.run({"latents": tile}, self.stream)

            parts = [decoded_in_tiles(each[None], decoding.tile, decode) for each in latents]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def encode_picture(self, pixels: Array, mask: Array | None = None) -> dict[str, Array]:
        """Return the latent moments of a picture [1, H, W, 3]; the encoder stays bound while a workspace uses it.

        Where `mask` [1, H, W] is true the picture is gray, for an encoder that reads what is kept of it.
        """
        inputs = {"image": pixels}
        if "kept" in (spec.name for spec in self.bundle.graph("image_encoder").inputs):
            kept = np.ones(pixels.shape[:3], np.float32) if mask is None else ~mask
            inputs["kept"] = kept[..., None].astype(np.float32)
        return self._run("image_encoder", inputs)

    def encode_prompt(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return, on the host, what later graphs read of the stage "prompt" for token ids and numbers [n, ...]."""
        if (known := self.prompts.get(inputs)) is not None:
            return dict(known)
        tensors = dict(inputs)
        for graph in self.bundle.manifest.graphs:
            if graph.stage == "prompt":
                tensors |= self._run(graph.name, {spec.name: tensors[spec.name] for spec in graph.inputs})
        self.prompts.put(inputs, tensors)
        return {name: tensors[name] for name in self.prompts.names}

    @contextmanager
    def _bound(self, name: str, inputs: Mapping[str, Array], *, once: bool = False) -> Iterator[BoundGraph]:
        """Bind a graph for the shapes of host arrays: while the running request's workspace is kept, or for the block.

        With `low_memory` it is for the block, and its stage's engines are closed after it.
        """
        graph = self.bundle.graph(name)
        if not (once or self.low_memory):
            bound, keys = self._shared.bound(graph, inputs)
            self._wanted |= keys
            yield bound
            return
        try:
            engine = self._shared.engine(graph, {name: array.shape for name, array in inputs.items()})
            with closing(BoundGraph(self.backend.device, engine, graph, inputs)) as bound:
                yield bound
        finally:
            if self.low_memory:
                self.release(graph.stage)

    def _run(self, name: str, inputs: Mapping[str, Array], *, once: bool = False) -> dict[str, Array]:
        """Run one graph on host arrays, bound as `_bound` does it, and return its outputs on the host."""
        with self._bound(name, inputs, once=once) as bound:
            return bound.run(inputs, self.stream)
