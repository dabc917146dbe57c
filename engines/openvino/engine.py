"""Compiled models of OpenVINO as an engine."""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle import GraphInfo
from ..device import Stream, Tensor
from ..engine import check_binding
from ..errors import EngineError, reason
from ..host import HostStream, HostTensor
from .library import load_openvino
from .models import CompiledModels


class OpenVinoEngine:
    """A graph's compiled models; each binding has a request of its own, on its own memory."""

    def __init__(self, graph: GraphInfo, models: CompiledModels, nbytes: int = 0) -> None:
        """`nbytes` are those of the weights, which each compiled model packs for itself."""
        self.name, self.nbytes = graph.name, nbytes
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self._models: CompiledModels | None = models

    def bind(self, tensors: Mapping[str, Tensor]) -> OpenVinoBinding:
        """Bind inputs and outputs to memory, compiling for shapes that are new; see `Engine.bind`."""
        if self._models is None:
            raise EngineError(f"engine {self.name} is closed")
        check_binding(self, tensors)
        return OpenVinoBinding(self, self._models, tensors)

    def close(self) -> None:
        """Free the compiled models; calling it again does nothing."""
        self._models = None

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._models is None


class OpenVinoBinding:
    """A request whose inputs and outputs are the memory of tensors: nothing is copied on the processor."""

    def __init__(self, engine: OpenVinoEngine, models: CompiledModels, tensors: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._tensors = dict(tensors)  # keeps the memory alive
        compiled = models.take({name: tensors[name].shape for name in engine.inputs}, self)
        try:
            self._request = compiled.create_infer_request()
            ports = {name: port for port in (*compiled.inputs, *compiled.outputs) for name in port.names}
            for name, tensor in tensors.items():
                assert isinstance(tensor, HostTensor)
                self._request.set_tensor(ports[name], load_openvino().Tensor(tensor.array, shared_memory=True))
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
