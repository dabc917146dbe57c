"""The denoising loop: N times (denoiser, step graph) over two alternating sets of buffers.

Everything that a step needs is on the device, the step counter too, and every address is fixed: a step is enqueued, or
captured once and replayed, with nothing coming from the host. The step graph must not write over its own inputs, so
even steps read set 0 and write set 1, and odd steps the other way round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...engines.bundle import GraphInfo
from ...engines.device import Array, Device, Graph, Stream, Tensor
from ...engines.engine import BoundEngine, Engine, Shapes

OpenEngine = Callable[[GraphInfo, Shapes], Engine]
"""Opens a graph's engine for given input shapes; the same engine when it is open already."""

Mode = Literal["eager", "step", "loop", "request"]
"""What is captured once and replayed: nothing, a step (an even and an odd one), all steps, or encode to decode."""

STATE = ("latents", "history", "model_input", "timestep", "row")
"""What a step reads from one set of buffers and writes, as `next_…`, to the other."""

ALIGNMENT = 256
"""Bytes that the address of a tensor must be a multiple of, for TensorRT; those of whole tensors are."""


class DenoiseLoop:
    """Buffers, bound engines and captured steps for one shape of request.

    `arrays` are the host arrays of a first request, by the names of the step graph's inputs plus `model_input` and
    `timestep`: their shapes and types are the loop's. `conditioning` are device tensors that the denoiser also reads.
    """

    def __init__(
        self,
        device: Device,
        denoiser: GraphInfo,
        arrays: Mapping[str, Array],
        conditioning: Mapping[str, Tensor],
    ) -> None:
        """Allocate the buffers."""

        constants = {name: array for name, array in arrays.items() if name not in STATE}
        state = {name: arrays[name] for name in STATE}
        prediction = next(spec for spec in denoiser.outputs if spec.name == "prediction")
        rows, channels, *cells = arrays["model_input"].shape
        if isinstance(prediction.shape[1], int):  # twice those of the latents, where variances are learned
            channels = prediction.shape[1]
        self._conditioning = conditioning
        self._device, self._batch = device, len(arrays["latents"])
        self._branches = rows // self._batch
        with ExitStack() as memory:
            self._constants = allocate_like(device, constants, memory)
            self._sets = [allocate_like(device, state, memory), allocate_like(device, state, memory)]
            self._prediction = allocate(device, (rows, channels, *cells), prediction.dtype, memory)
            self._memory = memory.pop_all()
        self.steps_done = 0
        """Steps of the running request, or of the last one, that have been enqueued."""
        self.asked: tuple[int, ...] = ()
        """Of how many branches of guidance, the last ones, each step of the request runs the rows; empty: of all."""
        self._unchanged: dict[str, Array] = {}
        self._bound: list[tuple[BoundEngine, BoundEngine]] = []
        self._picks: list[list[BoundEngine]] = []
        self._of_some: dict[int, list[OfSome]] = {}  # by the number of branches
        self._views: list[Tensor] = []
        self._captured = CapturedWork()

    def bind(
        self, open_engine: OpenEngine, denoiser: GraphInfo, step: GraphInfo, picks: Sequence[GraphInfo] = ()
    ) -> None:
        """Open both engines and bind them to each set of buffers; does nothing when they are bound.

        For a request whose guidance is not the same at every step the denoiser is bound to the rows of fewer branches
        as well.
        `picks` run before the denoiser, between tensors of the conditioning, and read the counter.
        """
        bound, picked = [], []
        for here, there in (self._sets, self._sets[::-1]) if not self._bound else ():
            picked.append([self._bound_pick(open_engine, graph, here) for graph in picks])
            network = self._network(denoiser, here)
            update = {"prediction": self._prediction, **self._constants, **here}
            update = {spec.name: update[spec.name] for spec in step.inputs}
            pair = (open_engine(denoiser, shapes_of(network)), open_engine(step, shapes_of(update)))
            update |= {f"next_{name}": tensor for name, tensor in there.items()}
            bound.append((pair[0].bind({**network, "prediction": self._prediction}), pair[1].bind(update)))
        self._bound, self._picks = self._bound or bound, self._picks or picked
        for branches in {*self.asked} - {self._branches, *self._of_some}:
            some = [self._bound_to_some(open_engine, denoiser, here, branches * self._batch) for here in self._sets]
            self._of_some[branches] = some

    def _network(self, graph: GraphInfo, here: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a graph reads of the conditioning and of one set of buffers."""
        return {spec.name: {**self._conditioning, **here}[spec.name] for spec in graph.inputs}

    def _bound_pick(self, open_engine: OpenEngine, graph: GraphInfo, here: Mapping[str, Tensor]) -> BoundEngine:
        inputs = self._network(graph, here)
        outputs = {spec.name: self._conditioning[spec.name] for spec in graph.outputs}
        return open_engine(graph, shapes_of(inputs)).bind({**inputs, **outputs})

    def _bound_to_some(
        self, open_engine: OpenEngine, denoiser: GraphInfo, here: Mapping[str, Tensor], count: int
    ) -> OfSome:
        """Return the denoiser bound to so many rows, those of the last branches, with what is copied around it.

        All rows of an image have one model input and one timestep, so that these are the first rows. What begins at an
        address that engines do not take is copied to and from memory of its own.
        """
        tensors = {**self._network(denoiser, here), "prediction": self._prediction}
        symbol = next(spec.shape[0] for spec in denoiser.inputs if spec.name == "model_input")
        copies: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        for spec in (*denoiser.inputs, *denoiser.outputs):
            if spec.name not in tensors or spec.shape[:1] != (symbol,):
                continue
            whole = tensors[spec.name]
            rows = whole.rows(0 if spec.name in STATE else whole.shape[0] - count, count)
            self._views.append(rows)
            tensors[spec.name] = rows
            if (rows.pointer - whole.pointer) % ALIGNMENT:
                twin = tensors[spec.name] = self._device.empty(rows.shape, rows.dtype)
                self._views.append(twin)
                copies[spec.name == "prediction"].append((rows, twin) if spec.name == "prediction" else (twin, rows))
        shapes = shapes_of({spec.name: tensors[spec.name] for spec in denoiser.inputs})
        return OfSome(open_engine(denoiser, shapes).bind(tensors), copies[False], copies[True])

    def binds(self, asked: tuple[int, ...]) -> bool:
        """Tell whether the denoiser is bound to the rows of so many branches as steps ask for."""
        return {*asked} <= {self._branches, *self._of_some}

    def unbind(self) -> None:
        """Let go of the engines and of what was captured of them; the buffers stay."""
        self._captured.close()
        self._bound, self._picks, self._of_some = [], [], {}
        while self._views:
            self._views.pop().close()

    def load(self, arrays: Mapping[str, Array], stream: Stream, asked: tuple[int, ...] = ()) -> None:
        """Copy a request's arrays to the device; shapes must be those of the first request.

        Read-only arrays that are still there from the request before (its sampler's tables) are not copied again.
        `asked` says of how many branches each step runs the rows; what runs fewer than all is bound next.
        """
        self.steps_done = 0
        self.asked = asked
        if self.asked:  # what is weighed by 0 must be finite
            self._prediction.write(np.zeros(self._prediction.shape, self._prediction.dtype), stream)
        for name, array in arrays.items():
            if name in STATE:
                self._sets[0][name].write(array, stream)
            elif self._unchanged.get(name) is not array:
                self._unchanged.pop(name, None)
                self._constants[name].write(array, stream)
                if not array.flags.writeable:
                    self._unchanged[name] = array

    def latents(self, steps_done: int) -> Tensor:
        """Return the tensor that holds the latents [B, C, h, w] after a number of steps."""
        return self._sets[steps_done % 2]["latents"]

    def replace_latents(self, steps_done: int, latents: Array, input_scale: float, stream: Stream) -> None:
        """Overwrite the latents after a number of steps, and the model input that follows from them."""
        state = self._sets[steps_done % 2]
        state["latents"].write(latents, stream)
        rows = np.tile(latents * np.float32(input_scale), (state["model_input"].shape[0] // len(latents), 1, 1, 1))
        state["model_input"].write(rows.astype(state["model_input"].dtype), stream)

    def run(
        self, steps: int, stream: Stream, *, mode: Mode = "step", on_step: Callable[[int], bool | None] | None = None
    ) -> Tensor:
        """Enqueue `steps` steps and return the tensor of the final latents; nothing waits unless `on_step` does.

        `on_step(i)` is called after step i was enqueued, and ends the run there when it returns true; with it, nothing
        larger than a step is captured.
        """
        if mode == "loop" and on_step is None:
            self._captured.run((steps, self.asked), partial(self.enqueue, steps), stream)
            self.steps_done = steps
            return self.latents(steps)
        for index in range(steps):
            key = (index % 2, self._branches_at(index))
            if mode == "eager":
                self._enqueue_step(*key, stream)
            else:
                self._captured.run(key, partial(self._enqueue_step, *key), stream)
            self.steps_done = index + 1
            if on_step is not None and on_step(index):
                break
        return self.latents(self.steps_done)

    def enqueue(self, steps: int, stream: Stream) -> None:
        """Enqueue `steps` steps, engine by engine."""
        for index in range(steps):
            self._enqueue_step(index % 2, self._branches_at(index), stream)

    def _branches_at(self, index: int) -> int:
        return self.asked[index] if self.asked else self._branches

    def _enqueue_step(self, parity: int, branches: int, stream: Stream) -> None:
        denoiser, step = self._bound[parity]
        for pick in self._picks[parity]:
            pick.enqueue(stream)
        (denoiser if branches == self._branches else self._of_some[branches][parity]).enqueue(stream)
        step.enqueue(stream)

    def close(self) -> None:
        """Free graphs and buffers; calling it again does nothing."""
        self.unbind()
        self._memory.close()


@dataclass(frozen=True)
class OfSome:
    """A denoiser bound to the rows of some branches alone, and copies (to, from) before and after it."""

    bound: BoundEngine
    before: Sequence[tuple[Tensor, Tensor]]
    after: Sequence[tuple[Tensor, Tensor]]

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one execution."""
        for to, source in self.before:
            to.copy(source, stream)
        self.bound.enqueue(stream)
        for to, source in self.after:
            to.copy(source, stream)


class CapturedWork:
    """Captured graphs by key, at most `capacity` of them; the least recently used goes first.

    Work with a new key runs as it is, is captured the second time, and replayed from then on: GPU libraries allocate
    and choose kernels in the first run of a binding, which a capture forbids, and a loop's state allows no dry run.
    """

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()

    def run(self, key: Hashable, enqueue: Callable[[Stream], None], stream: Stream) -> None:
        """Do what `enqueue` does with the stream: by calling it, or by replaying what it did."""
        if key not in self._graphs:
            enqueue(stream)
            self._graphs[key] = None
            if len(self._graphs) > self._capacity:
                _close(self._graphs.popitem(last=False)[1])
            return
        graph = self._graphs[key]
        if graph is None:
            with stream.capture() as capture:
                enqueue(stream)
            graph = self._graphs[key] = capture.finish()
        self._graphs.move_to_end(key)
        graph.replay(stream)

    def close(self) -> None:
        """Free all graphs; calling it again does nothing."""
        for graph in self._graphs.values():
            _close(graph)
        self._graphs.clear()


def _close(graph: Graph | None) -> None:
    if graph is not None:
        graph.close()


def allocate(device: Device, shape: Sequence[int], dtype: npt.DTypeLike, memory: ExitStack) -> Tensor:
    """Return a new tensor that `memory` frees."""
    tensor = device.empty(shape, dtype)
    memory.callback(tensor.close)
    return tensor


def allocate_like(device: Device, arrays: Mapping[str, Array], memory: ExitStack) -> dict[str, Tensor]:
    """Return new tensors of the shapes and types of host arrays, which `memory` frees."""
    return {name: allocate(device, array.shape, array.dtype, memory) for name, array in arrays.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of named tensors."""
    return {name: tensor.shape for name, tensor in tensors.items()}
