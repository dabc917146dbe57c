"""Calls that fail, one after the other, of the simulated driver and library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latentrt.engines.errors import EngineError

from .simulated_codes import CUresult, Failure


class Nth:
    """Counts the calls that it stands for and lets one of them fail."""

    def __init__(self, failure: Callable[[], Any]) -> None:
        """`failure` raises, or returns what a call that failed returns."""
        self.failure = failure
        self.calls = 0
        self.fails_at: int | None = None

    def instead_of(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is `real`, but for the call that fails."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return self.failure() if self.calls == self.fails_at else real(*arguments, **options)

        return call

    def quiet(self) -> None:
        """Let nothing fail."""
        self.fails_at = None

    def armed(self, number: int) -> None:
        """Let the call of this number, counted from 1 and from now on, fail."""
        self.calls, self.fails_at = 0, number


def no_memory() -> Any:
    raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)


def broken() -> Any:
    raise EngineError("the call was made to fail")


OF_THE_LIBRARY: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "shapes": ("set_input_shape", lambda: False),
    "addresses": ("set_tensor_address", lambda: False),
    "runs": ("execute_async_v3", lambda: False),
    "contexts": ("__init__", broken),
}
"""Methods of an execution context, and how each fails."""
