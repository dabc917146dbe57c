"""From records to what people read: the README's tables, plots, and one page that holds everything."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

from ...engines.errors import RequestError
from ...engines.files import write_atomically
from . import plots
from .engine_tables import compile_table, replay_table
from .records import Record
from .tables import Section, Table, conditions, sections

BEGIN, END = "<!-- measurements:begin -->", "<!-- measurements:end -->"

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>latentrt measurements</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #cbd2d9; } h3 { margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:first-child { background: #f0f4f8; }
p.small { color: #52606d; font-size: .85rem; } img { max-width: 100%; } code { background: #f0f4f8; }
</style></head><body><h1>latentrt measurements</h1>
$body
</body></html>
""")


def text(records: Iterable[Record]) -> str:
    """Return records as plain text, for a terminal."""
    return "\n\n".join(_markdown(section) for section in _all_sections(records))


def update_readme(path: Path, records: Iterable[Record], *, write: bool = True) -> bool:
    """Replace the measurements of a README between its markers; return whether they were current.

    Raises `RequestError` when the file or its markers are missing.
    """
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: give the file that holds the measurements with --readme") from error
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
        raise RequestError(f"{path} has no place for measurements: add the lines {BEGIN} and {END}")
    head, _, rest = old.partition(BEGIN)
    new = f"{head}{BEGIN}\n{text(records)}\n{END}{rest.partition(END)[2]}"
    if write and new != old:
        write_atomically(path, new.encode())
    return new == old


def write_plots(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write every section's plots as PNG files and return their paths."""
    written = []
    for section in _all_sections(records):
        for name, png in plots.section_plots(section.records, section.title).items():
            path = folder / f"{_slug(section)}-{name}.png"
            write_atomically(path, png)
            written.append(path)
    return written


def write_page(records: Iterable[Record], path: Path) -> Path:
    """Write one self-contained page with all tables and plots and return its path."""
    body = "\n".join(_html(section) for section in _all_sections(records))
    write_atomically(path, _PAGE.substitute(body=body).encode())
    return path


def _all_sections(records: Iterable[Record]) -> list[Section]:
    """Return the sections of all kinds of records: contenders first, then what is measured with none beside it."""
    records = list(records)
    out = sections(records)
    for kind, title, make in (
        ("replay", "Between two steps", replay_table),
        ("rtx-compile", "TensorRT-RTX engines built without a GPU", compile_table),
    ):
        machines: dict[str, list[Record]] = {}
        for record in (r for r in records if r["kind"] == kind):
            machines.setdefault(f"{record['machine']['processor']} {record['machine']['gpu']}", []).append(record)
        out += [Section(title, conditions(found[-1]), [make(found)], [], found) for found in machines.values()]
    return out


def _markdown(section: Section) -> str:
    parts = [f"### {section.title}", section.conditions + "."]
    for table in section.tables:
        parts += [f"**{table.title}**", table.markdown()]
    if section.missing:
        parts.append("Not measured: " + "; ".join(section.missing) + ".")
    return "\n\n".join(parts)


def _html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", f'<p class="small">{_inline(section.conditions)}.</p>']
    for name, png in plots.section_plots(section.records, section.title).items():
        data = base64.b64encode(png).decode()
        parts.append(f'<p><img alt="{html.escape(f"{section.title}: {name}")}" src="data:image/png;base64,{data}"></p>')
    parts += [_table(table) for table in section.tables]
    if section.missing:
        parts.append(f"<p>Not measured: {html.escape('; '.join(section.missing))}.</p>")
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    grid = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f'<h3>{html.escape(table.title)}</h3>\n{grid}\n<p class="small">{_inline(table.note)}</p>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _slug(section: Section) -> str:
    record = section.records[0]
    where = (
        record["machine"]["gpu"]["name"] if record["conditions"]["device"] == "cuda" else record["machine"]["processor"]
    )
    return re.sub(r"[^a-z0-9]+", "-", f"{where} {section.title}".lower()).strip("-")
