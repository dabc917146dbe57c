"""What the values of a network's config may be, where this package reads or computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...engines.errors import CheckpointError, LatentRTError, UnsupportedModelError

MOST_LEVELS = 16
MOST_CHANNELS = 256
LARGEST = 1 << 20
MOST = 1e38


@dataclass(frozen=True)
class Kind:
    """The values that a key may have: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        """Return the kind of what fits one of two."""
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST < value < MOST  # no NaN either


def _list_of(value: Any, fits: Callable[[Any], bool], most: int = MOST_LEVELS) -> bool:
    return isinstance(value, list | tuple) and 1 <= len(value) <= most and all(map(fits, value))


WHOLE = Kind(f"a whole number from 1 to {LARGEST}", _whole)
WHOLES = Kind(f"a list of 1 to {MOST_LEVELS} such numbers", lambda value: _list_of(value, _whole))
NUMBER = Kind("a finite number", _number)
NUMBERS = Kind(f"a list of 1 to {MOST_CHANNELS} finite numbers", lambda value: _list_of(value, _number, MOST_CHANNELS))
SCALE = Kind("a number that is finite and not zero", lambda value: _number(value) and value != 0)
WORDS = Kind(f"a list of 1 to {MOST_LEVELS} names", lambda value: _list_of(value, lambda word: isinstance(word, str)))
NULL = Kind("null", lambda value: value is None)
PAIR = Kind("a pair of them", lambda value: _list_of(value, _whole) and len(value) == 2)


def check_plain(config: Mapping[str, Any], where: str) -> None:
    """Raise `UnsupportedModelError`, naming `where`, for the config of a quantized network, which says so."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{where} is quantized ({shown(method)} in quantization_config): only plain floating-point weights have "
            "the values that an export needs; give the checkpoint that it was made from"
        )


def check_config(config: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raise `CheckpointError`, naming `where`, for a key whose value is not of its kind."""
    for key, kind in kinds.items():
        if not kind.fits(config.get(key)):
            raise CheckpointError(f"{where}: {key} is {shown(config.get(key))} in its config; give {kind.words}")


def check_depth(config: Mapping[str, Any], keys: Sequence[str], tensors: int, where: str) -> None:
    """Raise `CheckpointError` when the counts of layers under `keys` ask for more layers than there are `tensors`.

    Every layer has a weight. A network is not built from counts that no file bears out, which could take for ever.
    """
    product = 1
    for key in keys:
        value = config.get(key)
        product *= max((n for n in _numbers(value)), default=1)
    if product > tensors:
        counts = ", ".join(f"{key} {shown(config.get(key))}" for key in keys)
        raise CheckpointError(f"{where}: its config asks for more layers ({counts}) than its files have tensors")


def shown(value: Any) -> str:
    """Return a value from a file as it stands in a message, cut when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def said_by(error: BaseException) -> str:
    """Return what a third party's exception says as a part of one line, or else its name."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return text[:300] or type(error).__name__


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise `CheckpointError` for what the system says of a file that cannot be read; also decorates functions."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LatentRTError):
            raise
        raise CheckpointError(f"{what} cannot be read ({said_by(error)})") from error


def _numbers(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int) else []
