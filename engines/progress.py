"""How long work reports what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a stage, the work done in it and the work in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@contextmanager
def terminal_bar(what: str) -> Iterator[Progress]:
    """Yield a function `(stage, done, total)` that moves a bar on standard error, a terminal, until the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"{what}: {stage}" if stage else what, completed=done, total=total)

        yield update
