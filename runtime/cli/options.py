"""What several commands take: a bundle, a checkpoint, and `--option NAME=VALUE` for a backend's constructor."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ...engines.backends import factory, names, resolve
from ...engines.bundle import Bundle
from ...engines.errors import BundleError, CheckpointError, RequestError

BackendOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        metavar="NAME=VALUE",
        help="Option of the backend, such as optimization_level=5 or weights_on_gpu=2GiB; may be repeated.",
    ),
]

Forecast = Annotated[
    str | None,
    typer.Option("--forecast", help="Leave out evaluations of the network, not exact: taylor, or spectrum."),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option("--guidance-interval", help="Guide only between two shares of the steps, such as 0.1,0.6; not exact."),
]
GuidanceReuse = Annotated[
    float | None,
    typer.Option("--guidance-reuse", help="Keep what guidance adds from a share of the steps on; not exact."),
]

Number = TypeVar("Number", int, float)
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])(i?)B?", re.IGNORECASE)
PYTHON_ONLY = ("name", "cache", "progress")
"""Parameters that are no text."""


def opened_bundle(path: Path) -> Bundle:
    """Open a bundle; raises `RequestError` when there is nothing at this path, else `BundleError`."""
    try:
        return Bundle.open(path)
    except BundleError as error:
        if path.exists():
            raise
        raise RequestError(str(error)) from error


@contextmanager
def checkpoint_named(source: str) -> Iterator[None]:
    """Make a `CheckpointError` inside the block a `RequestError` when `source` is a path at which there is nothing."""
    try:
        yield
    except CheckpointError as error:
        is_path = source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/")
        if Path(source).exists() or not is_path:
            raise
        raise RequestError(str(error)) from error


def check_backend(name: str) -> None:
    """Raise `RequestError` for a backend that there is not, whether or not it could run here."""
    if name not in ("auto", *names()):
        raise RequestError(f"--backend {name!r} is not known: choose auto, {', '.join(names())}")


def backend_options(backend: str, given: Sequence[str] | None, *, threads: int | None = None) -> dict[str, Any]:
    """Return a backend's options from `NAME=VALUE` texts and from `--threads`.

    Raises `RequestError` for an option, or a backend, that there is not.
    """
    check_backend(backend)
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    if given:
        name = resolve(backend)
        named = options_of(factory(name), name, given)
        if both := sorted(options.keys() & named.keys()):
            raise RequestError(f"{both[0]} was given twice: give --{both[0]} or --option {both[0]}=N")
        options |= named
    return options


def options_of(function: Callable[..., Any], owner: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Return arguments of a function from `NAME=VALUE` texts, each of the type that the function declares.

    Numbers of bytes may be written as 500MB or 2GiB. Raises `RequestError` for an unknown name or a bad value.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    known = {name: p.annotation for name, p in parameters.items() if name not in PYTHON_ONLY}
    options = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"option is {text!r}: give NAME=VALUE, where {owner} has {', '.join(known)}")
        if name not in known:
            raise RequestError(f"{owner} has no option {name!r}: it has {', '.join(known)}")
        if name in options:
            raise RequestError(f"option {name} is given twice: give it once")
        options[name] = _value(name, value, known[name])
    return options


def bytes_of(option: str, text: str | None) -> int | None:
    """Return the number of bytes that an option gives, such as 500MB or 2GiB; raises `RequestError`."""
    return None if text is None else int(_value(option, text, int))


def numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number] | None:
    """Return the numbers of an option, between commas; raises `RequestError` for anything else."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        sort = "whole numbers" if kind is int else "numbers"
        raise RequestError(f"{option} is {text!r}: give {sort} with commas between them") from error


def _value(name: str, text: str, kind: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    from ..request import problem_of

    if size := SIZE.fullmatch(text.strip()):
        unit = (1024 if size[3] else 1000) ** ("KMG".index(size[2].upper()) + 1)
        text = str(int(float(size[1]) * unit))
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise RequestError(f"option {name} is {text!r}: {problem_of(error).text}") from error
