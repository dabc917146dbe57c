"""One ONNX Runtime session as an engine; what differs between its devices is how a binding runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..bundle import GraphInfo
from ..device import Tensor
from ..engine import BoundEngine, check_binding
from ..errors import EngineError, reason

Bind = Callable[["OnnxRuntimeEngine", Mapping[str, Tensor]], BoundEngine]


class OnnxRuntimeEngine:
    """One session; each binding keeps its own input and output addresses."""

    def __init__(self, graph: GraphInfo, session: Any, bind: Bind, nbytes: int = 0) -> None:
        """`bind` makes a binding of this engine from tensors that fit the graph; `nbytes` are those of its weights."""
        self.name, self.nbytes = graph.name, nbytes
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}
        self._session = session
        self._bind = bind

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundEngine:
        """Bind inputs and outputs to memory; see `Engine.bind`."""
        self._open()
        check_binding(self, tensors)
        return self._bind(self, tensors)

    def addresses(self, tensors: Mapping[str, Tensor], kind: str, number: int = 0) -> Any:
        """Return ONNX Runtime's binding of the session to the memory of tensors on device `number` of a kind."""
        binding = self._open().io_binding()
        for name, tensor in tensors.items():
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            bind(name, kind, number, tensor.dtype, tensor.shape, tensor.pointer)
        return binding

    def run(self, addresses: Any, options: Any = None) -> None:
        """Run the session on bound memory; raises `EngineError` when it is closed or fails."""
        session = self._open()
        try:
            session.run_with_iobinding(addresses, options)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise EngineError(f"engine {self.name} failed: {reason(error)}") from error

    def close(self) -> None:
        """Free the session; calling it again does nothing."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            raise EngineError(f"engine {self.name} is closed")
        return self._session
