"""One self-contained page of all tables and plots, readable on a phone and on a wide screen."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from string import Template

from . import plots
from .records import slug
from .summary import headlines
from .table import Table
from .tables import Section

SHORT = 14
"""Letters below which a table's cell stays on one line."""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>latentrt measurements</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #cbd2d9; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; vertical-align: bottom; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:first-child { background: #f0f4f8; }
nav li { margin: .3rem 0; } nav a { font-weight: 600; }
.lead { font-size: 1.1rem; } .small { color: #52606d; font-size: .85rem; } img { max-width: 100%; height: auto; }
code { background: #f0f4f8; }
@media (max-width: 62rem) {
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { padding: .5rem .6rem; border-bottom: 1px solid #cbd2d9; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0; }
  td:first-child { font-weight: 600; justify-content: flex-start; gap: .5rem; }
  td::before { content: attr(data-label); color: #52606d; text-align: left; }
  td[data-label=""]::before { content: none; }
}
</style></head><body><h1>latentrt measurements</h1>
$head
$body
</body></html>
""")


def page(sections: Sequence[Section]) -> str:
    """Return the page: a line that sums it up, contents, and every section with its plots and tables."""
    first = next((section for section in sections if _compared(section)), None)
    lead = f'<p class="lead">{html.escape(f"{first.title}: latentrt is {_compared(first)[0]}.")}</p>' if first else ""
    entries = [
        f'<li><a href="#{slug(section.title)}-{number}">{html.escape(section.title)}</a> '
        f'<span class="small">{html.escape("; ".join(_compared(section)))}</span></li>'
        for number, section in enumerate(sections)
    ]
    contents = f"<nav><ul>{''.join(entries)}</ul></nav>"
    body = "\n".join(_section(section, number) for number, section in enumerate(sections))
    return _PAGE.substitute(head=f"{lead}\n{contents}", body=body)


def _compared(section: Section) -> list[str]:
    """Return what latentrt is to each other contender; empty where none stands beside it."""
    return headlines(section.records) if section.records[0]["kind"] == "latency" else []


def _section(section: Section, number: int) -> str:
    parts = [
        f'<h2 id="{slug(section.title)}-{number}">{html.escape(section.title)}</h2>',
        f'<p class="small">{_inline(section.conditions)}.</p>',
    ]
    for name, png in plots.section_plots(section.records, section.title).items():
        data = base64.b64encode(png).decode()
        parts.append(f'<p><img alt="{html.escape(f"{section.title}: {name}")}" src="data:image/png;base64,{data}"></p>')
    parts += [_table(table) for table in section.tables]
    if section.missing:
        parts.append(f"<p>Not measured: {html.escape('; '.join(section.missing))}.</p>")
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{html.escape(name)}">{_cell(cell)}</td>'
            for name, cell in zip(table.header, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h3>{html.escape(table.title)}</h3>\n{grid}\n<p class="small">{_inline(table.note)}</p>'


def _cell(text: str) -> str:
    return html.escape(text.replace(" ", "\N{NO-BREAK SPACE}") if len(text) < SHORT else text)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
