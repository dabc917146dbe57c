"""Progress on standard error, silent when it is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function `(stage, done, total)` that draws a bar until the block ends."""
    if not sys.stderr.isatty():
        from ...engines.progress import silent

        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"{what}: {stage}" if stage else what, completed=done, total=total)

        yield update
