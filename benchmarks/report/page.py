"""From records to what people read: tables and a chart between the lines of documents, plots, and one page of all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...engines.errors import RequestError
from ...engines.files import write_atomically
from . import plots, summary, web
from .engine_tables import compile_table, replay_table
from .records import Record, by_machine, slug
from .serving_tables import serving_sections
from .tables import Section, conditions, sections

BEGIN, END = "<!-- measurements:begin -->", "<!-- measurements:end -->"
SUMMARY_BEGIN, SUMMARY_END = "<!-- summary:begin -->", "<!-- summary:end -->"


def text(records: Iterable[Record]) -> str:
    """Return records as plain text, for a terminal."""
    return "\n\n".join(_markdown(section) for section in _all_sections(records))


def update_tables(path: Path, records: Iterable[Record], *, write: bool = True) -> bool:
    """Replace all tables of a document between its markers `BEGIN` and `END`; return whether they were current.

    Raises `RequestError` when the file or its markers are missing.
    """
    return _replace_between(path, (BEGIN, END), text(records), write)


def update_summary(path: Path, records: Iterable[Record], *, write: bool = True) -> bool:
    """Replace the one small table between the markers `SUMMARY_BEGIN` and `SUMMARY_END`; return whether it was current.

    Raises `RequestError` when the file or its markers are missing, or no record is of the summary's workloads.
    """
    return _replace_between(path, (SUMMARY_BEGIN, SUMMARY_END), summary.summary(records), write)


def _replace_between(path: Path, markers: tuple[str, str], new: str, write: bool) -> bool:
    begin, end = markers
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: give a file that has the lines {begin} and {end}") from error
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise RequestError(f"{path} has no place for what was measured: add the lines {begin} and {end}")
    whole = f"{old.partition(begin)[0]}{begin}\n{new}\n{end}{old.partition(end)[2]}"
    if write and whole != old:
        write_atomically(path, whole.encode())
    return whole == old


def write_chart(path: Path, records: Iterable[Record]) -> Path:
    """Write the chart of latentrt beside its rivals on the embedded model as a PNG file and return its path.

    Raises `RequestError` when no record is of that model.
    """
    found = summary.chosen(records, summary.WORKLOADS[0])
    if not found:
        raise RequestError(f"no record of {summary.WORKLOADS[0]}: run `latentrt bench {summary.WORKLOADS[0]}` first")
    write_atomically(path, plots.rivals(found))
    return path


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
    write_atomically(path, web.page(_all_sections(records)).encode())
    return path


def _all_sections(records: Iterable[Record]) -> list[Section]:
    """Return the sections of all kinds of records: contenders first, then what is measured with none beside it."""
    records = list(records)
    out = sections(records)
    for kind, title, make in (
        ("replay", "Between two steps", replay_table),
        ("rtx-compile", "TensorRT-RTX engines built without a GPU", compile_table),
    ):
        machines = by_machine(record for record in records if record["kind"] == kind)
        out += [Section(title, conditions(found[-1]), [make(found)], [], found) for found in machines]
    return out + serving_sections(records)


def _markdown(section: Section) -> str:
    parts = [f"### {section.title}", section.conditions + "."]
    for table in section.tables:
        parts += [f"**{table.title}**", table.markdown()]
    if section.missing:
        parts.append("Not measured: " + "; ".join(section.missing) + ".")
    return "\n\n".join(parts)


def _slug(section: Section) -> str:
    record = section.records[0]
    on_gpu = record["conditions"]["device"] == "cuda"
    where = record["machine"]["gpu"]["name"] if on_gpu else record["machine"]["processor"]
    return slug(f"{where} {section.title}")
