"""How wide a batcher is: its slots, its network rows, and the numbers of rows that a step may compute."""

from __future__ import annotations

from numbers import Real

from ...engines.errors import RequestError

MAX_ROWS = 1024
SLOTS, ROWS = 8, 8
"""Where nothing else is said. By simulation on every curve, 8 slots on 8 rows take no fewer requests than 4 do."""
BUCKETS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
"""Numbers of network rows that a step may compute, below the most."""
STATIC_BUCKETS: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""The same where each costs an engine of its own, or a plan a profile."""


def rows_of(slots: int) -> int:
    """Return how many network rows so many slots share where nothing else is said: 2 each, but no more than `ROWS`."""
    return max(slots, min(2 * slots, ROWS))


def buckets_of(rows: int, *, dynamic: bool, fixed_rows: bool = False) -> tuple[int, ...]:
    """Return the numbers of network rows that steps compute on a dynamic backend or another, `rows` at most."""
    narrower = () if fixed_rows else BUCKETS if dynamic else STATIC_BUCKETS
    return (*(bucket for bucket in narrower if bucket < rows), rows)


def slots_of_steps(slots: int, *, compiles_shapes: bool) -> tuple[int, ...]:
    """Return of how many slots, from the first, a step may be: of all, where another number would be compiled."""
    fewer = () if compiles_shapes else tuple(1 << power for power in range(slots.bit_length()))
    return (*(number for number in fewer if number < slots), slots)


def check_numbers(slots: int, rows: int | None, max_waiting: int, max_wait: float | None) -> int:
    """Return a batcher's network rows, as many as suit its slots for None; raises `RequestError` for bad options."""
    check_whole("slots", slots, 1, MAX_ROWS // 2)
    rows = rows_of(slots) if rows is None else rows
    check_whole("rows", rows, max(2, slots), MAX_ROWS)
    check_whole("max_waiting", max_waiting, 1, 2**31)
    check_seconds("max_wait", max_wait)
    return rows


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Raise `RequestError` unless an option is a whole number in its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} is {value!r}: give a whole number from {least} to {most}")


def check_seconds(name: str, value: float | None) -> None:
    """Raise `RequestError` unless an option is a number above 0, or left out."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not value > 0):
        raise RequestError(f"{name} is {value!r}: give seconds, more than 0, or leave it out")
