"""What a model sees of Triton's Python backend: requests, responses, errors and metrics, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        assert isinstance(message, str) and "\n" not in message
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Sender:
    """Where responses go; `answered` is set with the last one, after which none may come."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.answered = threading.Event()
        self.cancelled = False
        self.on_send: Callable[[InferenceResponse | None], object] = lambda response: None

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.answered.is_set(), "a response after the last one"
        self.on_send(response)
        if response is not None:
            self.responses.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.answered.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """A request with inputs as numpy arrays of the types that the configuration names."""

    def __init__(self, outputs: Sequence[str], timeout: int = 0, /, **inputs: np.ndarray[Any, Any]) -> None:
        self.inputs, self._outputs, self._timeout = inputs, list(outputs), timeout
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return "7"

    def timeout(self) -> int:
        return self._timeout

    def requested_output_names(self) -> list[str]:
        return self._outputs


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    array = request.inputs.get(name)
    return None if array is None else Tensor(name, array)


class Metric:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, value: float) -> None:
        assert value >= 0
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    made: dict[str, dict[tuple[str, ...], Metric]]

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert kind in (self.COUNTER, self.GAUGE) and description
        self.metrics = self.made.setdefault(name, {})

    def Metric(self, labels: dict[str, str]) -> Metric:
        assert {"model", "instance"} <= set(labels)
        return self.metrics.setdefault(tuple(labels.values())[2:], Metric())


def module() -> Any:
    """Return the module `triton_python_backend_utils`, with counts of its own."""
    family = type("MetricFamily", (MetricFamily,), {"made": {}})
    names = ("Tensor", "TritonError", "InferenceResponse", "get_input_tensor_by_name")
    found = {name: globals()[name] for name in (*names, "TRITONSERVER_RESPONSE_COMPLETE_FINAL")}
    return SimpleNamespace(**found, MetricFamily=family)
