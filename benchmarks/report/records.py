"""Records: one JSON object a line, one file a machine; everything that is published is made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engines.errors import RequestError, StorageError

FORMAT = 1
RESULTS = Path(__file__).parent.parent / "results"

Record = dict[str, Any]


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a file, each as one line; raises `StorageError` when it cannot be written."""
    text = "".join(json.dumps(_rounded({"format": FORMAT, **record})) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error


def read(path: Path) -> list[Record]:
    """Return the records of a file in order; raises `RequestError` for a file that is missing or damaged."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"records {path} cannot be read: give a .jsonl file that `latentrt bench` wrote") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path} line {number} is no JSON ({error}): remove the line") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise RequestError(f"{path} line {number} has format {_format(record)!r}, this latentrt reads {FORMAT}")
        records.append(record)
    return records


def read_run(given: str) -> list[Record]:
    """Return the records of `FILE`, or of one run of it, `FILE@RUN`; raises `RequestError` when there are none."""
    path, _, run = given.partition("@")
    records = [record for record in read(Path(path)) if not run or record.get("run") == run]
    if not records:
        raise RequestError(f"{path} holds no records{f' of run {run!r}' if run else ''}")
    return records


def latest(records: Iterable[Record], kind: str = "latency") -> dict[tuple[str, ...], Record]:
    """Return the newest record of a kind for each workload and contender (or axis, for a scaling study)."""
    return {key_of(record): record for record in records if record["kind"] == kind}


def key_of(record: Record) -> tuple[str, ...]:
    """Return what makes two records comparable: the work, who did it, and with how many threads."""
    work = record["workload"]
    size = f"{work['width']}x{work['height']}, {work['steps']} steps, batch {work['batch']}"
    options = f"guidance {work['guidance']:g}, {work['precision']}"
    who = (record["contender"]["name"], f"{record['conditions']['threads']} threads")
    return (work["name"], size, options, *who, record.get("axis", ""))


def _format(record: Any) -> Any:
    return record.get("format") if isinstance(record, dict) else record


def _rounded(value: Any) -> Any:
    """Return a value with its floats cut to seven digits: no clock says more."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
