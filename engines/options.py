"""Options of backends, described where they are declared: `Annotated[int, "what it means"]` on a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

Bytes = Annotated[int, "bytes"]
"""A number of bytes; on the command line it may be written as 500MB or 2GiB."""

Tf32 = Annotated[
    bool,
    "whether fp32 convolutions and matrix products may round what they multiply to 10 bits (TF32), faster, not exact",
]
"""An option of every GPU backend: none rounds unless it is asked to."""

_WORDS = {int: "number", bool: "yes or no", str: "text", Bytes: "bytes, such as 2GiB"}


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
