"""What this process writes and whom it calls, as Python's audit events tell it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CALLING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen")

_places: list[str] | None = None


def _changed(event: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Return the paths that an event writes to."""
    if event == "open":
        return [arguments[0]] if arguments[2] & WRITING else []
    if event in ("os.rename", "os.link"):
        return list(arguments[:2])
    return [arguments[1] if event == "os.symlink" else arguments[0]] if event in CHANGING else []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _places is None:
        return
    if event in CALLING:
        _places.append(f"{event} {arguments!r}")
    for path in _changed(event, arguments):
        if not isinstance(path, int):
            _places.append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_hook)


@contextmanager
def only_in(*folders: Path) -> Iterator[None]:
    """Fail at the end of the block when it wrote outside the folders, or called anybody."""
    global _places
    allowed = [*(os.path.realpath(folder) for folder in folders), os.devnull]
    before, _places = _places, []
    try:
        yield
    finally:
        seen, _places = _places, before
    outside = [place for place in dict.fromkeys(seen) if not any(Path(place).is_relative_to(each) for each in allowed)]
    assert outside == []
