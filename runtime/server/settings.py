"""What the HTTP side of a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.errors import RequestError
from ..service.work import check_timer


@dataclass(frozen=True)
class HttpSettings:
    """Limits on connections and bodies, and what is said to whom."""

    keys: tuple[str, ...] = ()
    """Any of these is a client's; none: everybody may ask."""
    max_body: int = 32 << 20
    """Bytes."""
    body_timeout: float = 30.0
    """Seconds in which a request's head and its body must have come."""
    send_timeout: float = 30.0
    """Seconds for which a client may read nothing of what is sent to it."""
    max_connections: int = 1000
    heartbeat: float = 10.0
    """Seconds of silence in a stream after which a comment is sent."""
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise `RequestError` for limits that allow nothing."""
        for name in ("body_timeout", "send_timeout", "heartbeat"):
            check_timer(name, getattr(self, name))
        for name in ("max_body", "max_connections"):
            if not (value := getattr(self, name)) > 0:
                raise RequestError(f"{name} is {value!r}: give more than 0")
