"""Records: one JSON object a line, one file a machine; everything that is published is made from them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engines.errors import RequestError, StorageError

FORMAT = 1

Record = dict[str, Any]


def checkout() -> Path | None:
    """Return the source tree that this code runs from, None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def results_folder() -> Path:
    """Return the folder for records: `benchmarks/results` of a source tree, else one of the user's own.

    That is `$LATENTRT_HOME/records`, else `$XDG_DATA_HOME/latentrt/records`, else `~/.local/share/latentrt/records`.
    """
    if root := checkout():
        return root / "benchmarks" / "results"
    if given := os.environ.get("LATENTRT_HOME"):
        return Path(given).expanduser() / "records"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "latentrt" / "records"


def default_file(machine: Mapping[str, Any]) -> Path:
    """Return the file of a machine's records, such as `amd-epyc-2-cores.jsonl`."""
    gpu = machine.get("gpu")
    name = gpu["name"] if gpu else f"{machine['processor']} {machine['cores']} cores"
    return results_folder() / f"{slug(re.sub(r'[(](r|tm)[)]', '', name.lower()))}.jsonl"


def slug(text: str) -> str:
    """Return a text as a file name: small letters and digits, dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check_writable(path: Path) -> None:
    """Raise `StorageError` unless records can be added to a file; a file that was not there is not left behind.

    Meant to be called before a measurement, which may take hours.
    """
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error


class Journal:
    """Records of a run that goes on, in a file of its own beside that of finished runs; a context manager.

    It ends with the run: left behind, and named, only when the block ends with an error or the process is killed.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        """Keep records beside the file `path`; `say` is told where they are when the run does not end well."""
        self.path = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        self._say = say

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write a record at once; one that cannot be written is only said: the run may still end well."""
        try:
            append(self.path, [record])
        except StorageError as error:
            self._say(str(error))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self._say(f"what was measured until then is in {self.path}")


def append(path: Path, records: Iterable[Mapping[str, Any]], show: Callable[[str], object] | None = None) -> None:
    """Add records to the end of a file, each as one line, and flush them to the disk: all of them or none.

    Raises `StorageError` when that fails; it names the temporary file that holds the records instead, or says that
    `show` was given their lines because there can be none.
    """
    data = "".join(json.dumps(_rounded({"format": FORMAT, **record})) + "\n" for record in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            broken = file.read(1) not in (b"", b"\n")  # a line that another program left half written
            try:
                _write_whole(file.fileno(), b"\n" * broken + data)
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {_kept(data, show)}") from error


def _write_whole(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _kept(data: bytes, show: Callable[[str], object] | None) -> str:
    """Put data where it is not lost, and say where in half a sentence."""
    name = None
    try:
        handle, name = tempfile.mkstemp(prefix="latentrt-records-", suffix=".jsonl")
        try:
            _write_whole(handle, data)
        finally:
            os.close(handle)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        why = f"nor a temporary file ({error.strerror or error})"
        if show is None:
            return f"{why}: the records are lost"
        show(data.decode().rstrip())
        return f"{why}: the records are the lines on standard output, put them into a .jsonl file"
    return f"the records are in {name}"


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
    everything = read(Path(path))
    records = [record for record in everything if not run or record.get("run") == run]
    if not records and everything and run:
        dates = {r["run"]: f"{r['run']} ({r['date'][:10]})" for r in everything if "run" in r}
        raise RequestError(f"{path} holds no run {run!r}: it has {', '.join(dates.values()) or 'records of no run'}")
    if not records:
        raise RequestError(f"{path} holds no records: run `latentrt bench embedded --output {path}` first")
    return records


def by_machine(records: Iterable[Record]) -> list[list[Record]]:
    """Return the records of each machine: one processor with so many cores and one kind of GPU."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        machine = record["machine"]
        gpu = machine["gpu"]["name"] if machine["gpu"] else None  # without its clock, which never stands still
        groups.setdefault((machine["processor"], machine["cores"], gpu), []).append(record)
    return list(groups.values())


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
