"""How wide a batcher is: its slots, its network rows, and the numbers of rows that a step may compute."""

from __future__ import annotations

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


def check_numbers(slots: int, rows: int, max_waiting: int, max_wait: float | None) -> None:
    """Raise `RequestError` for options of a batcher that are out of range."""
    for name, value, least, most in (
        ("slots", slots, 1, MAX_ROWS // 2),
        ("rows", rows, max(2, slots), MAX_ROWS),
        ("max_waiting", max_waiting, 1, 2**31),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise RequestError(f"{name} is {value!r}: give a whole number from {least} to {most}")
    if max_wait is not None and not max_wait > 0:
        raise RequestError(f"max_wait is {max_wait!r}: give seconds, more than 0, or leave it out")
