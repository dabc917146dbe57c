"""Tensors and bound engines of one request shape, from token ids to pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ...engines.bundle import STAGES, Bundle, GraphInfo, Stage, TensorInfo
from ...engines.device import Array, Device, Event, Stream, Tensor
from ...engines.engine import BoundEngine, Engine, shape_of, solve_sizes
from ...engines.errors import BundleError, EngineError
from . import hoisted
from .decoding import WHOLE, Decoding
from .denoise import CapturedWork, DenoiseLoop, Mode, OpenEngine, allocate, allocate_like, shapes_of

Release = Callable[[Stage], None]
"""Closes the engines of a stage."""


def allocate_outputs(
    device: Device, graph: GraphInfo, inputs: Mapping[str, Tensor], memory: ExitStack
) -> dict[str, Tensor]:
    """Return a new tensor for every output of a graph, shaped by its inputs; `memory` frees them."""
    sizes = solve_sizes({spec.name: spec for spec in graph.inputs}, shapes_of(inputs))
    return {spec.name: allocate(device, shape_of(spec, sizes), spec.dtype, memory) for spec in graph.outputs}


class BoundGraph:
    """A graph bound once to tensors of its own, and run on host arrays of their shapes."""

    def __init__(self, device: Device, engine: Engine, graph: GraphInfo, inputs: Mapping[str, Array]) -> None:
        """Allocate tensors of the shapes of `inputs`, and of the outputs that follow from them."""
        self._outputs = [spec.name for spec in graph.outputs]
        with ExitStack() as memory:
            self._tensors = allocate_like(device, inputs, memory)
            self._tensors |= allocate_outputs(device, graph, self._tensors, memory)
            self._bound: BoundEngine | None = engine.bind(self._tensors)
            self._memory = memory.pop_all()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values()) if self._bound is not None else 0

    def run(self, inputs: Mapping[str, Array], stream: Stream) -> dict[str, Array]:
        """Run the graph and return its outputs on the host."""
        if self._bound is None:
            raise EngineError("a closed graph was run: bind it again")
        for name, array in inputs.items():
            self._tensors[name].write(array, stream)
        self._bound.enqueue(stream)
        return {name: self._tensors[name].read(stream) for name in self._outputs}

    def close(self) -> None:
        """Free the binding and its memory; calling it again does nothing."""
        self._bound = None
        self._memory.close()


def run_once(
    device: Device, engine: Engine, graph: GraphInfo, inputs: Mapping[str, Array], stream: Stream
) -> dict[str, Array]:
    """Run a graph once on host arrays and return its outputs on the host; nothing stays allocated."""
    with closing(BoundGraph(device, engine, graph, inputs)) as bound:
        return bound.run(inputs, stream)


def padded(array: Array, count: int) -> Array:
    """Return rows with the last one repeated until there are `count`."""
    return array if len(array) == count else np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


@dataclass
class Trace:
    """Points in the stream before, between and after encode, denoise and decode, and the memory used by then."""

    events: list[Event] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the device's memory in use when the stage's work had been enqueued, its engines still open."""
    steps: int = 0
    """Steps that were run: fewer than there are when the request was interrupted."""

    def seconds(self) -> list[float]:
        """Return how long each stage took; waits for the last."""
        return [after.milliseconds_since(before) / 1e3 for before, after in pairwise(self.events)]


class Workspace:
    """Everything that is allocated once for a shape and used again by the next request of that shape.

    Graphs are wired by tensor name: what one writes, every later one reads. With `release`, engines are opened for
    their stage and closed after it, so that one stage's weights are in memory at a time.
    """

    def __init__(
        self,
        device: Device,
        bundle: Bundle,
        open_engine: OpenEngine,
        inputs: Mapping[str, Array],
        arrays: Mapping[str, Array],
        release: Release | None = None,
        decoding: Decoding = WHOLE,
    ) -> None:
        """Allocate all tensors and, unless engines are released after each stage, bind them.

        Pictures in tiles are decoded elsewhere, from the latents that a run without `decode` leaves.
        """
        self._device, self._bundle, self._open, self._release = device, bundle, open_engine, release
        prompt_graphs = [graph for graph in bundle.manifest.graphs if graph.stage == "prompt"]
        # what is given in place of all that a graph writes is not computed
        self._prompt_graphs = [g for g in prompt_graphs if not all(spec.name in inputs for spec in g.outputs)]
        self._encoded = False  # what the prompt graphs write is there
        self._held: Mapping[str, Array] = {}  # of it, by the arrays that it is equal to
        self._prompt: list[BoundEngine] = []
        self._request: list[BoundEngine] = []
        self._request_graphs, self._picks = hoisted.of_request(bundle.manifest), hoisted.picks(bundle.manifest)
        self._decoders: list[BoundEngine] = []
        self._requests = CapturedWork()
        self.uses: set[Any] = set()
        """Keys of what it shares with other workspaces."""
        denoiser = bundle.graph("denoiser")
        self.decoding = decoding
        self._decoder = None if decoding.tile else bundle.graph(decoding.graph)
        self.pictures: dict[str, Tensor] = {}
        with ExitStack() as memory:
            self._tensors = allocate_like(device, inputs, memory)
            for graph in (*self._prompt_graphs, *self._request_graphs, *self._picks):
                given = self._inputs(graph, [spec for spec in graph.inputs if spec.name not in arrays])
                self._tensors |= allocate_outputs(device, graph, given, memory)
            read = [spec for graph in (denoiser, *self._picks) for spec in graph.inputs if spec.name not in arrays]
            conditioning = self._inputs(denoiser, read)
            self.loop = DenoiseLoop(device, denoiser, arrays, conditioning)
            memory.callback(self.loop.close)
            if self._decoder is not None:
                self.pictures = allocate_outputs(device, self._decoder, {"latents": self.loop.latents(0)}, memory)
            memory.callback(self._unbind)  # runs first: what is bound goes before its memory
            if release is None:
                self._bind_prompt()
                self._bind_request()
                self._bind_loop()
                self._bind_decoder()
            self._memory = memory.pop_all()

    def load(
        self,
        inputs: Mapping[str, Array],
        arrays: Mapping[str, Array],
        stream: Stream,
        encoded: Mapping[str, Array] | None = None,
        asked: tuple[int, ...] = (),
    ) -> None:
        """Copy a request's token ids, numbers and loop arrays to the device.

        `encoded` is what the prompt graphs would write that others read: they do not run then. `asked` says of
        how many branches of guidance each step runs the rows; empty: of all.
        """
        held, self._held, self._encoded = self._held, {}, encoded is not None
        for name, array in {**inputs, **(encoded or {})}.items():
            if held.get(name) is not array:
                self._tensors[name].write(array, stream)
        self._held = encoded or {}
        self.loop.load(arrays, stream, asked)
        if self._release is None:
            self._bind_loop()

    def run(
        self, steps: int, stream: Stream, *, mode: Mode, decode: bool, on_step: Callable[[int], bool | None] | None
    ) -> Trace:
        """Enqueue a loaded request and return where its stages begin and end in the stream.

        A request captured whole has no points between its stages: its time counts as denoising.
        """
        if mode == "request" and on_step is None and self._release is None:
            before = stream.record()

            def enqueue(stream: Stream) -> None:
                self._encode(stream)
                self._enqueue_request(stream)
                self.loop.enqueue(steps, stream)
                if decode:
                    self._decoders[steps % 2].enqueue(stream)

            self._requests.run((steps, decode, self._encoded, self.loop.asked), enqueue, stream)
            after = stream.record()
            return Trace([before, before, after, after], {"denoise": self._device.bytes_taken()}, steps)
        trace = Trace([stream.record()])
        try:
            if not self._encoded:
                self._bind_prompt()
            self._encode(stream)
            self._done("encode", "prompt", trace, stream)
            self._bind_request()
            self._enqueue_request(stream)
            self._let_go("request", stream)
            self._bind_loop()
            self.loop.run(steps, stream, mode=mode, on_step=on_step)
            trace.steps = self.loop.steps_done
            self._done("denoise", "step", trace, stream)
            if decode:
                self._bind_decoder()
                self._decoders[trace.steps % 2].enqueue(stream)
                self._done("decode", "end", trace, stream)
            else:
                trace.events.append(stream.record())
        except BaseException:  # a cancelled request must not keep engines that the next one closes
            with suppress(EngineError):
                for stage in STAGES:
                    self._let_go(stage, stream)
            raise
        return trace

    def preview(self, latents: Array, stream: Stream) -> Array:
        """Return the pictures [n, H, W, 3] of other latents [n, C, h, w], n at most the batch, on its bound decoder.

        Between two steps of a running request too: the set of buffers that the next step writes holds nothing by then.
        """
        free = self.loop.steps_done + 1
        tensor = self.loop.latents(free)
        tensor.write(padded(latents, tensor.shape[0]), stream)
        self._decoders[free % 2].enqueue(stream)
        return self.pictures["image"].read(stream)[: len(latents)]

    def encoded(self, names: Sequence[str], stream: Stream) -> dict[str, Array]:
        """Return what the prompt graphs have written, on the host."""
        self._held = {name: self._tensors[name].read(stream) for name in names}
        return dict(self._held)

    def _encode(self, stream: Stream) -> None:
        for bound in () if self._encoded else self._prompt:
            bound.enqueue(stream)

    def _enqueue_request(self, stream: Stream) -> None:
        for bound in self._request:
            bound.enqueue(stream)

    def _bind_prompt(self) -> None:
        self._prompt = self._prompt or [self._bound(graph) for graph in self._prompt_graphs]

    def _bind_request(self) -> None:
        self._request = self._request or [self._bound(graph) for graph in self._request_graphs]

    def _bound(self, graph: GraphInfo) -> BoundEngine:
        inputs, outputs = self._inputs(graph, graph.inputs), self._inputs(graph, graph.outputs)
        return self._open(graph, shapes_of(inputs)).bind({**inputs, **outputs})

    def _bind_loop(self) -> None:
        self.loop.bind(self._open, self._bundle.graph("denoiser"), self._bundle.graph("step"), self._picks)

    def _bind_decoder(self) -> None:
        if (graph := self._decoder) is None or self._decoders:
            return
        bound = []
        for parity in (0, 1):
            inputs = {"latents": self.loop.latents(parity)}
            bound.append(self._open(graph, shapes_of(inputs)).bind({**inputs, **self.pictures}))
        self._decoders = bound

    def _done(self, name: str, stage: Stage, trace: Trace, stream: Stream) -> None:
        """Note the end of a stage, and let go of its engines when they are not to stay."""
        trace.events.append(stream.record())
        trace.memory[name] = self._device.bytes_taken()
        self._let_go(stage, stream)

    def _let_go(self, stage: Stage, stream: Stream) -> None:
        """Close a stage's engines once their work is done, unless engines stay open."""
        if self._release is None:
            return
        stream.synchronize()
        if stage == "prompt":
            self._prompt = []
        elif stage == "request":
            self._request = []
        elif stage == "step":
            self.loop.unbind()
        elif stage == "end":
            self._decoders = []
        self._release(stage)

    def close(self) -> None:
        """Free all memory; calling it again does nothing."""
        self._memory.close()

    def _unbind(self) -> None:
        self._requests.close()
        self.loop.unbind()
        self._prompt, self._request, self._decoders = [], [], []

    def _inputs(self, graph: GraphInfo, specs: Sequence[TensorInfo]) -> dict[str, Tensor]:
        if missing := [spec.name for spec in specs if spec.name not in self._tensors]:
            raise BundleError(f"graph {graph.name} reads {missing[0]!r}, which no earlier graph of the bundle writes")
        return {spec.name: self._tensors[spec.name] for spec in specs}
