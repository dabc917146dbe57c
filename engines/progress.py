"""How long work reports what it does."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage, the work done in it and the work in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""
