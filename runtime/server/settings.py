"""What the HTTP side of a server allows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...engines.errors import RequestError


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
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise RequestError(f"{each.name} is {value!r}: give more than 0")
