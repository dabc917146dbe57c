"""What engines tell the ingress of a request: a job's events, plain values, and errors that arrive as they were raised.

An exception that a replica raises reaches the other side as Ray's, with a traceback for a text. And many of ours cannot
be pickled: they take more than their message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..service import Pictured, Previewed, Stepped
from ..service.counts import Figures


@dataclass(frozen=True)
class Taken:
    """The request is in a batcher's queue; its pictures have this size."""

    size: tuple[int, int]


@dataclass(frozen=True)
class Progress:
    """How far the request is: what a service's job says of it, and the last step of one image."""

    said: dict[str, Any]
    step: Stepped | None = None


@dataclass(frozen=True)
class Told:
    """What a replica's batchers are at, by model: every second of a request, and at its end."""

    replica: str
    figures: Mapping[str, Figures]


@dataclass(frozen=True)
class Done:
    """The request succeeded."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The request failed, or was refused."""

    kind: type[BaseException]
    message: str
    state: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """Take an exception apart."""
        return cls(type(error), str(error), {name: value for name, value in vars(error).items() if name[0] != "_"})

    @property
    def error(self) -> BaseException:
        """The exception."""
        error = self.kind.__new__(self.kind)
        error.args = (self.message,)
        vars(error).update(self.state)
        return error


Message = Taken | Progress | Told | Previewed | Pictured | Done | Failed
"""Pictures come as the job's own events; steps with what the job says, and not each of them."""
