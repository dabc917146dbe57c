"""A device that takes the time of a curve and computes nothing: what is above it is real, pipeline, batcher, server.

Its time is that of a GPU as seen from the host: work is put in a line and the host goes on, until it waits for what it
needs. A step lasts as long as the curve says for its rows; what a server does beside it on the host costs what it costs
here. Outputs are zeros, so pictures are black.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Stream, Tensor
from ...engines.engine import Shapes, check_binding
from ...engines.errors import EngineError
from ...engines.host import HostDevice, HostEvent, HostStream, HostTensor
from .curve import Curve


class Clock:
    """When the device will be done with what it was given; `now` and `sleep` are the host's."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, sleep: Callable[[float], object] = time.sleep):
        self.now, self._sleep = now, sleep
        self.until = 0.0
        self.spent = 0.0
        """Seconds of work that the device was given."""

    def spend(self, seconds: float) -> None:
        """Give the device work of so many seconds."""
        self.until = max(self.now(), self.until) + seconds
        self.spent += seconds

    def wait(self, until: float) -> None:
        """Wait until the device's time is no less than `until`."""
        while (left := until - self.now()) > 0:
            self._sleep(left)


class PacedEvent(HostEvent):
    """The moment at which the device is done with the work before it."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._time = clock, max(clock.now(), clock.until)

    def synchronize(self) -> None:
        """Wait for that moment."""
        self._clock.wait(self._time)


class PacedStream(HostStream):
    """Copies happen at once; engines take their time on the device's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def synchronize(self) -> None:
        """Wait until the device is done."""
        super().synchronize()
        self._clock.wait(self._clock.until)

    def record(self) -> PacedEvent:
        """Return an event behind the work so far."""
        return PacedEvent(self._clock)


class PacedDevice(HostDevice):
    """The host's memory beside a clock."""

    name = "paced"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def stream(self) -> PacedStream:
        """Create a stream."""
        return PacedStream(self.clock)


class PacedEngine:
    """One graph: bound, its outputs are zeros, and a run takes `seconds(rows)`."""

    nbytes = 0

    def __init__(self, graph: GraphInfo, clock: Clock, seconds: Callable[[int], float]) -> None:
        self.name = graph.name
        self.inputs = {spec.name: spec for spec in graph.inputs}
        self.outputs = {spec.name: spec for spec in graph.outputs}
        self._clock, self._seconds, self._closed = clock, seconds, False

    def bind(self, tensors: Mapping[str, Tensor]) -> PacedBinding:
        """Bind inputs and outputs to memory; see `Engine.bind`."""
        if self._closed:
            raise EngineError(f"engine {self.name} is closed")
        check_binding(self, tensors)
        for name in self.outputs.keys() & tensors.keys():
            tensor = tensors[name]
            assert isinstance(tensor, HostTensor)
            tensor.array[...] = 0
        rows = next(iter(tensors[name].shape[0] for name in self.inputs if tensors[name].shape))
        return PacedBinding(partial(self._clock.spend, self._seconds(rows)))

    def close(self) -> None:
        """Let nothing more be bound; calling it again does nothing."""
        self._closed = True


class PacedBinding:
    """A bound engine: a run is time and nothing else."""

    def __init__(self, spend: Callable[[], None]) -> None:
        self._spend = spend

    def enqueue(self, stream: Stream) -> None:
        """Take the time, or record it when the stream captures."""
        assert isinstance(stream, HostStream)
        stream.submit(self._spend)


class PacedBackend:
    """Opens a bundle's graphs as engines of a curve: `Pipeline(bundle, PacedBackend(curve))`.

    The denoiser takes a step of its rows, prompt graphs the curve's encoding time for each two rows, the decoder its
    decoding time for each image; the other graphs take none.
    """

    name = "paced"
    compiles_shapes = False
    can_capture = True

    def __init__(self, curve: Curve, clock: Clock | None = None) -> None:
        """Open a device of its own."""
        self.curve, self.dynamic = curve, curve.dynamic
        self.device = PacedDevice(clock or Clock())
        self.lock = threading.RLock()

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Build nothing."""

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> PacedEngine:
        """Open one graph of a bundle."""
        return PacedEngine(graph, self.device.clock, self._pace(graph))

    def _pace(self, graph: GraphInfo) -> Callable[[int], float]:
        curve = self.curve
        if graph.name == "denoiser":
            return curve.step
        if graph.stage == "prompt":
            return lambda rows: rows / 2 * curve.encode
        if graph.name == "decoder":
            return lambda images: images * curve.decode
        return lambda rows: 0.0
