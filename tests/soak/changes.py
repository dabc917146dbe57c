"""Values that nobody expects, put into JSON values at random places."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**400, -0.5, 0.5, 1.5, 1e308, -1e308, 1e-308),
    *(
        "",
        " ",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "a\nb",
        "\0",
        "\ud83d",
        "NaN",
        "-Infinity",
        "x" * 300,
        "C:x",
        "a//b",
    ),
    *([], {}, [[]], {"": {}}, [None], {"a": [1, 2]}, [0.0] * 10),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *places(inner, (*path, key)))]


def changed(value: Any, generator: random.Random) -> Any:
    """Return a copy with one to three values replaced, removed, repeated, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 2, 3))):
        *way, last = generator.choice(places(value) or [((),)])
        holder = value
        for key in way:
            holder = holder[key]
        if not isinstance(holder, dict | list):
            continue
        kind = generator.choice(("replace", "replace", "remove", "repeat", "rename", "exchange"))
        if kind == "replace":
            holder[last] = copy.deepcopy(generator.choice(ODD))
        elif kind == "remove":
            del holder[last]
        elif kind == "exchange":
            other = generator.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[last], holder[other] = holder[other], holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif kind == "rename":
            holder[str(generator.choice(ODD))[:100]] = holder.pop(last)
    return value


@contextmanager
def no_longer_than(seconds: int, what: object) -> Iterator[None]:
    """Raise in the main thread when the block hangs."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"this hangs: {str(what)[:2000]}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
