"""Timesteps and sigmas that a request gives itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError

__all__ = ["checked_values"]


def checked_values(
    what: str, values: Sequence[float] | None, extra: int | None, sampler: str
) -> NDArray[np.float64] | None:
    """Return timesteps or sigmas as an array, None where none are given.

    `extra`: how many more of them than steps the sampler takes; None: it takes none. Raises RequestError unless they
    are finite, of 0 or more, and decrease.
    """
    if values is None:
        return None
    if extra is None:
        raise RequestError(f"{sampler} takes no {what}: leave them out, or see latentrt samplers for one that does")
    try:
        numbers = np.array([float(value) for value in values], np.float64)
    except (TypeError, ValueError):
        raise RequestError(f"{what} are no list of numbers: give decreasing numbers, such as 999, 499") from None
    if len(numbers) <= extra:
        raise RequestError(f"{what} has {len(numbers)} numbers: give {extra + 1} or more")
    falls = np.diff(numbers) < 0
    if not np.isfinite(numbers).all() or numbers[-1] < 0 or not falls.all():
        place = int(np.argmin(falls)) if not falls.all() else len(numbers) - 2
        few = ", ".join(f"{number:g}" for number in numbers[max(place, 0) : place + 2])
        raise RequestError(f"{what} must decrease and stay at 0 or above: here {few} follow each other")
    return numbers
