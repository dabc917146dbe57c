"""A compiled model of OpenVINO as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bundle import GraphInfo
from ..device import Stream, Tensor
from ..engine import check_binding
from ..errors import EngineError, reason
from ..host import HostStream, HostTensor
from .library import load_openvino


class OpenVinoEngine:
    """One compiled model; each binding has a request of its own, on its own memory."""

    def __init__(self, graph: GraphInfo, compiled: Any) -> None:
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self._compiled = compiled

    def bind(self, tensors: Mapping[str, Tensor]) -> OpenVinoBinding:
        """Bind inputs and outputs to memory; see `Engine.bind`."""
        if self._compiled is None:
            raise EngineError(f"engine {self.name} is closed")
        check_binding(self, tensors)
        return OpenVinoBinding(self, self._compiled, tensors)

    def close(self) -> None:
        """Free the compiled model; calling it again does nothing."""
        self._compiled = None

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._compiled is None


class OpenVinoBinding:
    """A request whose inputs and outputs are the memory of tensors: nothing is copied on the processor."""

    def __init__(self, engine: OpenVinoEngine, compiled: Any, tensors: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._tensors = dict(tensors)  # keeps the memory alive
        try:
            self._request = compiled.create_infer_request()
            ports = {name: port for port in (*compiled.inputs, *compiled.outputs) for name in port.names}
            for name, tensor in tensors.items():
                assert isinstance(tensor, HostTensor)
                self._request.set_tensor(ports[name], load_openvino().Tensor(tensor.array, shared_memory=True))
        except KeyError as error:
            raise EngineError(
                f"engine {engine.name} has no tensor {error}, and its graph has: build it again"
            ) from error
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"engine {engine.name} cannot be bound: {reason(error)}") from error

    def enqueue(self, stream: Stream) -> None:
        """Run now, or record the run when the stream captures."""
        assert isinstance(stream, HostStream)
        stream.submit(self._run)

    def _run(self) -> None:
        if self._engine.closed:
            raise EngineError(f"engine {self._engine.name} is closed")
        try:
            self._request.infer()
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"engine {self._engine.name} failed: {reason(error)}") from error
