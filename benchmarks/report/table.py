"""A table of text, and how figures and names stand in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..contenders import is_exact
from .records import Record

DASH = "–"
NOT_EXACT = "≈"
"""Stands before whoever computes less than was asked for, or more coarsely."""
MARK_SAYS = f"{NOT_EXACT}: not exact"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, with a sentence on what the columns are where they need one."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, numbers to the right, columns padded to read well as plain text."""
        cells = [list(self.header), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [_line(self.header, widths), _line([_rule(i, w) for i, w in enumerate(widths)], widths)]
        lines += [_line(row, widths) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def marked(record: Record, title: str | None = None) -> str:
    """Return a contender's title, or another in its place, with `NOT_EXACT` before it where it is not exact."""
    who = record["contender"]
    title = title or str(who["title"])
    return title if is_exact(who["name"]) else f"{NOT_EXACT} {title}"


def mib(size: float) -> str:
    """Return bytes as text."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _rule(column: int, width: int) -> str:
    return "-" * width if column == 0 else "-" * (width - 1) + ":"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pad: Callable[[int, str], str] = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])  # noqa: E731
    return "| " + " | ".join(pad(i, cell) for i, cell in enumerate(cells)) + " |"
