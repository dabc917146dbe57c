"""Tensors and bound engines of one request shape, from token ids to pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..engines.bundle import Bundle, GraphInfo, TensorInfo
from ..engines.device import Array, Device, Event, Stream, Tensor
from ..engines.engine import BoundEngine, Engine, shape_of, solve_sizes
from ..engines.errors import BundleError
from .loop import CapturedWork, DenoiseLoop, Mode

OpenEngine = Callable[[GraphInfo, Mapping[str, Sequence[int]]], Engine]
"""Opens a graph's engine for given input shapes."""


def allocate_outputs(device: Device, engine: Engine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a new tensor for every output of an engine, shaped by its inputs."""
    sizes = solve_sizes(engine.inputs, {name: tensor.shape for name, tensor in inputs.items()})
    return {name: device.empty(shape_of(spec, sizes), spec.dtype) for name, spec in engine.outputs.items()}


class Workspace:
    """Everything that is allocated once for a shape and used again by the next request of that shape."""

    def __init__(
        self,
        device: Device,
        bundle: Bundle,
        open_engine: OpenEngine,
        token_ids: Mapping[str, Array],
        arrays: Mapping[str, Array],
    ) -> None:
        """Wire the graphs by tensor name: what one writes, every later one reads."""
        self._tensors: dict[str, Tensor] = {name: device.empty(ids.shape, ids.dtype) for name, ids in token_ids.items()}
        self._owned: list[Tensor] = list(self._tensors.values())
        self._prompt: list[BoundEngine] = []
        for graph in _stage(bundle, "prompt"):
            inputs = self._inputs(graph, graph.inputs)
            engine = open_engine(graph, _shapes(inputs))
            outputs = allocate_outputs(device, engine, inputs)
            self._tensors |= outputs
            self._owned += outputs.values()
            self._prompt.append(engine.bind({**inputs, **outputs}))
        self._requests = CapturedWork()
        self.loop = self._loop(device, bundle, open_engine, arrays)
        latents = [self.loop.latents(parity) for parity in (0, 1)]
        decoder = open_engine(bundle.graph("decoder"), {"latents": latents[0].shape})
        self.pictures = allocate_outputs(device, decoder, {"latents": latents[0]})
        self._owned += self.pictures.values()
        self._decoders = [decoder.bind({"latents": tensor, **self.pictures}) for tensor in latents]

    def _loop(
        self, device: Device, bundle: Bundle, open_engine: OpenEngine, arrays: Mapping[str, Array]
    ) -> DenoiseLoop:
        graph, step_graph = bundle.graph("denoiser"), bundle.graph("step")
        state = [t for t in graph.inputs if t.name in arrays]
        conditioning = self._inputs(graph, [t for t in graph.inputs if t not in state])
        shapes = {**_shapes(conditioning), **{t.name: arrays[t.name].shape for t in state}}
        denoiser = open_engine(graph, shapes)
        prediction = shape_of(denoiser.outputs["prediction"], solve_sizes(denoiser.inputs, shapes))
        inputs = {t.name: prediction if t.name == "prediction" else arrays[t.name].shape for t in step_graph.inputs}
        return DenoiseLoop(device, denoiser, open_engine(step_graph, inputs), arrays, conditioning)

    def load(self, token_ids: Mapping[str, Array], arrays: Mapping[str, Array], stream: Stream) -> None:
        """Copy a request's token ids and loop arrays to the device."""
        for name, ids in token_ids.items():
            self._tensors[name].write(ids, stream)
        self.loop.load(arrays, stream)

    def run(
        self, steps: int, stream: Stream, *, mode: Mode, decode: bool, on_step: Callable[[int], None] | None
    ) -> list[Event]:
        """Enqueue a loaded request; return the points before and after its stages: encode, denoise, decode.

        A request captured whole has no points between its stages: its time counts as denoising.
        """
        if mode == "request" and on_step is None:
            before = stream.record()

            def enqueue() -> None:
                self._encode(stream)
                self.loop.enqueue(steps, stream)
                self._decode(steps, stream, decode)

            self._requests.replay((steps, decode), enqueue, stream)
            after = stream.record()
            return [before, before, after, after]
        events = [stream.record()]
        self._encode(stream)
        events.append(stream.record())
        self.loop.run(steps, stream, mode=mode, on_step=on_step)
        events.append(stream.record())
        self._decode(steps, stream, decode)
        return [*events, stream.record()]

    def _encode(self, stream: Stream) -> None:
        for bound in self._prompt:
            bound.enqueue(stream)

    def _decode(self, steps: int, stream: Stream, wanted: bool) -> None:
        if wanted:
            self._decoders[steps % 2].enqueue(stream)

    def close(self) -> None:
        """Free all memory; calling it again does nothing."""
        self._requests.close()
        self.loop.close()
        for tensor in self._owned:
            tensor.close()
        self._owned = []

    def _inputs(self, graph: GraphInfo, specs: Sequence[TensorInfo]) -> dict[str, Tensor]:
        if missing := [spec.name for spec in specs if spec.name not in self._tensors]:
            raise BundleError(f"graph {graph.name} reads {missing[0]!r}, which no earlier graph of the bundle writes")
        return {spec.name: self._tensors[spec.name] for spec in specs}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _stage(bundle: Bundle, stage: str) -> list[GraphInfo]:
    return [graph for graph in bundle.manifest.graphs if graph.stage == stage]
