"""The texts that name bundles when a server is started: `PATH`, `NAME=PATH`, and `NAME=MODEL` for another name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...engines.bundle import Bundle
from ...engines.errors import RequestError


def named_bundles(given: Sequence[str], opened: Callable[[Path], Bundle] = Bundle.open) -> dict[str, Bundle]:
    """Return bundles of `PATH` or `NAME=PATH` texts by name, that of the folder where none is given.

    Raises `RequestError` for a name twice or a part left out, and what `opened` raises: `BundleError` for no bundle.
    """
    bundles: dict[str, Bundle] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            path, name = text, Path(text).absolute().name
        if not (name and path):
            raise RequestError(f"bundle is {text!r}: give PATH or NAME=PATH, such as sdxl=bundles/sdxl")
        if name in bundles:
            raise RequestError(f"two bundles are called {name!r}: give NAME=PATH for one of them")
        bundles[name] = opened(Path(path))
    return bundles


def named_aliases(given: Sequence[str]) -> dict[str, str]:
    """Return models by another name, from `NAME=MODEL` texts; raises `RequestError` for others and a name of two."""
    aliases: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not (name and equals and model):
            raise RequestError(f"alias is {text!r}: give NAME=MODEL, such as gpt-image-1=sdxl")
        if aliases.setdefault(name, model) != model:
            raise RequestError(f"alias {name} is given for {aliases[name]} and for {model}: give it once")
    return aliases
