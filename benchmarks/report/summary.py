"""What records come to in a line, in one small table and in one chart: latentrt beside what else could run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...engines.errors import RequestError
from .records import Record, by_machine, latest
from .table import DASH, MARK_SAYS, Table, marked, mib

WORKLOADS = ("embedded", "sd15-512")
"""What the summary tells of: fp32 on the processor, one picture a request."""
BESIDE = ("latentrt/openvino/step", "latentrt/openvino-bf16/step")
"""What latentrt's users may choose in place of its first mode."""
OTHERS = (
    "diffusers/eager",
    "diffusers/compile",
    "openvino",
    "optimum",
    "diffusers/eager-bf16",
    "diffusers/compile-bf16",
    "openvino/bf16",
)
BF16 = "Where a processor multiplies in bf16, others in bf16 were not measured here."


def is_ours(record: Record) -> bool:
    """Tell whether a record is latentrt's."""
    return str(record["contender"]["name"]).startswith("latentrt/")


def title_of(record: Record) -> str:
    """Return a contender's name for readers that see few modes of latentrt."""
    name = str(record["contender"]["name"])
    if not is_ours(record):
        return str(record["contender"]["title"])
    return f"latentrt, {name.split('/')[1]}" if name in BESIDE else "latentrt"


def is_lossy(record: Record) -> bool:
    """Tell whether a record is of a mode that leaves out evaluations of the network, or of a quantized one."""
    return "+" in str(record["contender"]["name"])


def headlines(group: Sequence[Record]) -> list[str]:
    """Return what latentrt's first mode is to each other contender of the same work, in a few words each."""
    ours = next((record for record in group if is_ours(record)), None)
    if ours is None:
        return []
    parts = []
    for theirs in (record for record in group if not is_ours(record)):
        memory = ours["memory"]["peak_bytes"] / theirs["memory"]["peak_bytes"]
        times = f"{_ratio(ours, theirs):.2f} × as fast as {title_of(theirs)}"
        parts.append(f"{times} with {memory:.2f} × its memory")
    return parts


def _ratio(ours: Record, theirs: Record) -> float:
    """Return their time over ours: of the same rounds where both were measured in one run, else of medians."""
    if ours["run"] == theirs["run"] and ours["ratio_to_first"] == 1 and theirs["ratio_to_first"]:
        return float(theirs["ratio_to_first"])
    return float(theirs["seconds"]["total"]["p50"] / ours["seconds"]["total"]["p50"])


def chosen(records: Iterable[Record], workload: str) -> list[Record]:
    """Return the newest fp32 records of a workload on a processor: of latentrt's first modes, then of the others.

    All come from the machine and the size of the newest that diffusers was measured at, too, or of the newest; empty
    when there are none of latentrt.
    """
    groups: dict[tuple[object, ...], dict[str, Record]] = {}
    for number, group in enumerate(by_machine(records)):
        for key, record in latest(group).items():
            work, device = record["workload"], record["conditions"]["device"]
            name = record["contender"]["name"]
            whole = not is_ours(record) or "-" not in name.rpartition("/")[2]  # its bundle as it is made by default
            if whole and (work["name"], work["precision"], work["batch"], device) == (workload, "fp32", 1, "cpu"):
                groups.setdefault((number, *key[:3], key[4]), {})[name] = record
    found = [g for g in groups.values() if any(map(is_ours, g.values())) and not any(map(is_lossy, g.values()))]
    if not found:
        return []
    beside = [group for group in found if OTHERS[0] in group] or found
    newest = max(beside, key=lambda group: max(record["date"] for record in group.values()))
    ours = next((r for name, r in newest.items() if is_ours(r) and name not in BESIDE), None)
    shown = [newest[name] for name in (*BESIDE, *OTHERS) if name in newest]
    return [ours, *shown] if ours else shown


def summary(records: Iterable[Record]) -> str:
    """Return one small table in Markdown, and a sentence on how its numbers were made.

    Raises `RequestError` when no record is of the summary's workloads.
    """
    records = list(records)
    found = {name: group for name in WORKLOADS if (group := chosen(records, name))}
    if not found:
        raise RequestError(f"no fp32 record of latentrt on a processor: run `latentrt bench {WORKLOADS[0]}` first")
    marks = _marks(found.values())
    names = list(dict.fromkeys(record["contender"]["name"] for group in found.values() for record in group))
    rows = []
    for name in names:
        entries = [next((r for r in group if r["contender"]["name"] == name), None) for group in found.values()]
        cells = zip(*(DASHES if entry is None else _cells(entry) for entry in entries), strict=True)
        mark = "".join(marks.get((r["workload"]["name"], r["run"]), "") for r in entries if r is not None)
        title = next(marked(entry, title_of(entry)) for entry in entries if entry is not None) + mark
        rows.append([title, *(column[0] if len(set(column)) == 1 else " / ".join(column) for column in cells)])
    in_bf16 = any(precision_of(record) == "bf16" for group in found.values() for record in group)
    note = _note([group[0] for group in found.values()], f"{MARK_SAYS}, see `pixels`." if in_bf16 else BF16)
    dates = {record["run"]: record["date"][:10] for group in found.values() for record in group}
    note += "".join(f" {mark} `{work}`: another run, {dates[run]}." for (work, run), mark in marks.items())
    return Table("", HEAD, rows, note).markdown()


def _marks(groups: Iterable[Sequence[Record]]) -> dict[tuple[str, str], str]:
    """Return a mark for each work and run of which there are rows beside those of the first row's run."""
    runs = dict.fromkeys((r["workload"]["name"], r["run"]) for g in groups for r in g if r["run"] != g[0]["run"])
    raised = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    return {run: str(number).translate(raised) for number, run in enumerate(runs, 1)}


HEAD = ("", "ran in", "request p50", "step", "peak memory", "shell to PNG", "pixels")
DASHES = (DASH,) * (len(HEAD) - 1)


def _cells(record: Record) -> tuple[str, ...]:
    seconds, cold = record["seconds"], record.get("cold")
    return (
        precision_of(record),
        duration(seconds["total"]["p50"]),
        duration(seconds["step"]["p50"]) if "step" in seconds else DASH,
        mib(record["memory"]["peak_bytes"]),
        duration(cold["seconds"]["p50"]) if cold else DASH,
        str((record.get("fidelity") or {}).get("max_pixel_difference", DASH)),
    )


def precision_of(record: Record) -> str:
    """Return the precision that a contender computed in, which need not be the one that was asked for."""
    options = record["contender"]["options"]
    ran = options.get("inference_precision") or options.get("precision") or record["workload"]["precision"]
    return {"f32": "fp32", "f16": "fp16"}.get(ran, str(ran))


def duration(seconds: float) -> str:
    """Return a time as text with three digits, in milliseconds below a second."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _note(firsts: Sequence[Record], exactness: str) -> str:
    works = " / ".join(
        f"`{work['name']}` ({work['width']}×{work['height']}, {work['steps']} steps, "
        f"{record['model']['weights'].partition(',')[0]} weights)"
        for record in firsts
        for work in (record["workload"],)
    )
    commands: dict[str, list[str]] = {}
    for record in firsts:
        commands.setdefault(made_on(record), []).append(f"`{record['command']}`{_noise(record)}")
    made = "; ".join(f"{where}: {' / '.join(these)}" for where, these in commands.items())
    return (
        f"{works}: medians; `pixels`: largest difference, of 255, to diffusers with the same noise. "
        f"`ran in`: what networks computed in. {exactness} {made}."
    )


def made_on(record: Record) -> str:
    """Return machine, threads and date of a record in a few words."""
    machine = record["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {record['date'][:10]}"


def _noise(record: Record) -> str:
    state = record["conditions"]
    return "" if state["quiet"] else f" (others used {state['others_share']:.0%} of the machine)"
