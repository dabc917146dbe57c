"""Options of backends, described where they are declared: `Annotated[int, "what it means"]` on a parameter."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from .errors import RequestError
from .machine import physical_cores

Bytes = Annotated[int, "bytes"]
"""A number of bytes; on the command line it may be written as 500MB or 2GiB."""

Tf32 = Annotated[
    bool,
    "whether fp32 convolutions and matrix products may round what they multiply to 10 bits (TF32), faster, not exact",
]
"""An option of every GPU backend: none rounds unless it is asked to."""

Threads = Annotated[
    int | None, "threads that a run uses (default: one for each physical core that this process may use)"
]
"""An option of every backend of the processor."""

_WORDS = {int: "number", bool: "yes or no", str: "text", Bytes: "bytes, such as 2GiB"}


def threads_of(given: int | None) -> int:
    """Return how many threads a run uses; raises `RequestError` for more than the machine has cores, or none."""
    if given is not None and not 1 <= given <= (os.cpu_count() or 1):
        raise RequestError(f"threads is {given}: this machine has {os.cpu_count()} cores, give 1 or more of them")
    return given or physical_cores()


def describe(function: Callable[..., Any]) -> dict[str, tuple[str, Any, str]]:
    """Return the type in words, the default and the meaning of each parameter that is annotated with one."""
    described = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            kind, meaning = get_args(parameter.annotation)[:2]
            described[name] = (_words(kind), parameter.default, meaning)
    return described


def _words(kind: Any) -> str:
    if word := _WORDS.get(kind):
        return word
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return " or ".join(_words(each) for each in get_args(kind) if each is not NoneType)
