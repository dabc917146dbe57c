"""Tables of what records say; the terminal, the README and the page show the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..contenders import NETWORKS, in_bf16
from .quality_tables import oracle_share, quality_table
from .records import Record, by_machine, latest
from .table import DASH, MARK_SAYS, NOT_EXACT, Table, marked, mib

MOVED = {f"latentrt.benchmarks.{name}": f"latentrt.benchmarks.measure.{name}" for name in ("replay", "rtx_compile")}
"""Modules that older records name in their commands, and where they are now."""


@dataclass(frozen=True)
class Section:
    """All tables of one workload on one machine, newest records only."""

    title: str
    conditions: str
    tables: list[Table]
    missing: list[str]
    records: list[Record]


def sections(records: Iterable[Record]) -> list[Section]:
    """Return a section for each machine and workload, in the order in which they were first measured."""
    return [section for group in by_machine(records) for section in _sections_of_machine(group)]


def _sections_of_machine(records: Sequence[Record]) -> list[Section]:
    grouped: dict[tuple[str, ...], list[Record]] = {}
    for kind in ("latency", "scaling"):
        for key, record in latest(records, kind).items():
            grouped.setdefault((*key[:3], key[4], kind), []).append(record)
    out: list[Section] = []
    for group in grouped.values():
        first = group[0]
        title = work_title(first)
        if title in {section.title for section in out}:
            title += f", guidance {first['workload']['guidance']:g}"
        if first["kind"] == "scaling":
            out.append(Section(f"{work_title(first)}: growth", conditions(first), [scaling_table(group)], [], group))
            continue
        absent = [r for r in records if r["kind"] == "missing" and r["run"] in {g["run"] for g in group}]
        names = {r["contender"]["name"] for r in group}
        missing = [f"{r['contender']['title']}: {r['reason']}" for r in absent if r["contender"]["name"] not in names]
        makers = (latency_table, quality_table, start_table, roofline_table, scenario_table)
        tables = [table for make in makers if (table := make(group)).rows]
        out.append(Section(title, conditions(first) + _other_runs(group), tables, missing, group))
    return out


def work_title(record: Record) -> str:
    """Return what was done, in a line."""
    work = record["workload"]
    batch = "" if work["batch"] == 1 else f", batch {work['batch']}"
    plural = "step" if work["steps"] == 1 else "steps"
    steps = "" if record["kind"] == "scaling" else f", {work['steps']} {plural}"
    return f"{work['name']}: {work['width']}×{work['height']}{steps}{batch}, {work['precision']}"


def conditions(record: Record) -> str:
    """Return where, how and when a record was made, in a sentence."""
    machine, state = record["machine"], record["conditions"]
    where = machine["gpu"]["name"] if state["device"] == "cuda" else f"{machine['processor']}, {machine['cores']} cores"
    pinned = " pinned" if record["kind"] in ("latency", "scaling") else ""
    parts = [f"{where}, {threads_of(record)}{pinned}, {machine['memory_gib']:g} GiB, {machine['system']}"]
    if "model" in record:
        parts.append(f"weights: {record['model']['weights']}; sampler: {record['model']['sampler']}")
    if "turns" in state:
        rounds = record["seconds"]["total"]["count"]
        parts.append(f"{rounds} rounds after {state['warmup']} warm-up requests, by turns: {state['turns']}")
    if not state["quiet"]:
        parts.append(f"NOT QUIET: others used {state['others_share']:.0%} of the machine")
    return "; ".join([*parts, f"{record['date'][:10]}; `{command(record)}`"])


def threads_of(record: Record) -> str:
    """Return in words how many threads of the processor were used."""
    count = record["conditions"]["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def command(record: Record) -> str:
    """Return how a record was made, as it can be given now."""
    return " ".join(MOVED.get(word, word) for word in record["command"].split(" "))


def _other_runs(group: Sequence[Record]) -> str:
    """Say which rows are not of the first one's run, and how each was made; nothing where all are."""
    runs: dict[str, list[Record]] = {}
    for record in group:
        if record["run"] != group[0]["run"]:
            runs.setdefault(record["run"], []).append(record)
    said = []
    for records in runs.values():
        titles = ", ".join(record["contender"]["title"] for record in records)
        said.append(f". Of another run ({records[0]['date'][:10]}; `{command(records[0])}`): {titles}")
    return "".join(said)


def latency_table(group: Sequence[Record]) -> Table:
    """Return whole requests and their stages for each contender."""
    rows = []
    for record in group:
        seconds, near = record["seconds"], record.get("fidelity") or {}
        total = seconds["total"]
        ratio = record["ratio_to_first"]
        whole = seconds["encode"]["p50"] == 0  # captured as one: it has no borders between stages
        stages = [DASH if whole else _ms(seconds[name]["p50"]) for name in ("encode", "denoise", "decode")]
        rows.append(
            [
                marked(record),
                *(_ms(total[p]) for p in ("p50", "p90", "p99")),
                *stages,
                _ms(seconds["step"]["p50"]) if "step" in seconds else DASH,
                f"{ratio:.2f} ×" if ratio else DASH,
                mib(record["memory"]["peak_bytes"]),
                str(near.get("max_pixel_difference", DASH)),
            ]
        )
    head = ["", "request p50", "p90", "p99", "encode", "denoise", "decode", "step", "time ×", "memory", "pixels"]
    note = (
        "Milliseconds from prompt to PNG bytes; `time ×`: median over rounds, against the first row in the same run; "
        "`memory`: peak resident; `pixels`: largest difference, of 255, to diffusers in fp32 with the same noise."
    )
    if any(marked(record).startswith(NOT_EXACT) for record in group):
        note += f" {MARK_SAYS}."
    return Table("Latency", head, rows, note)


def start_table(group: Sequence[Record]) -> Table:
    """Return what it takes until the first picture."""
    rows = []
    for record in group:
        start, cold = record["start"], record.get("cold")
        rows.append(
            [
                marked(record),
                *(_s(start[name]) for name in ("import", "build", "open", "first_request")),
                _s(cold["seconds"]["p50"]) if cold else DASH,
                mib(cold["peak_bytes"]) if cold else DASH,
            ]
        )
    head = ["", "import", "build, once", "open", "first request", "shell to PNG", "its memory"]
    note = "Seconds; `shell to PNG` is a whole cold process: `latentrt generate`, or the shortest diffusers script."
    export = group[0]["model"]
    if export["export_seconds"]:
        peak = export["export_peak_bytes"] / 2**30
        note += f" Exporting the checkpoint took {export['export_seconds']:.0f} s and {peak:.1f} GiB, once."
    return Table("First picture", head, rows, note)


def roofline_table(group: Sequence[Record]) -> Table:
    """Return, for each network, what it asks for and what share of the machine's limit contenders reach."""
    ours, others = _partition(group)
    names = [record["contender"]["name"] for record in ours]
    rounding = [r for r, name in zip(ours[1:], names[1:], strict=True) if in_bf16(name) and "+" not in name]
    shown = [*ours[:1], *rounding, *others]  # modes of latentrt run the same networks, and differ by their precision
    rows = []
    for network in NETWORKS:
        entries = [record["roofline"][network] for record in shown]
        one = entries[0]
        asks = [f"{one['operations'] / 1e9:,.4g}", f"{one['bytes'] / 2**20:,.4g}", _ms(one["limit_seconds"])]
        rows.append([network, *asks, *(_reached(record, network) for record in shown)])
    ceiling, first = group[0]["ceiling"], shown[0]["roofline"]
    lacking = min(NETWORKS, key=lambda name: first[name]["share_of_limit"] or math.inf)
    bf16 = f" ({ceiling['flops_bf16'] / 1e9:,.0f} in bf16)" if "flops_bf16" in ceiling else ""
    note = (
        f"Milliseconds a run, and the share of the machine's limit: {ceiling['flops'] / 1e9:,.0f} GFLOP/s{bf16} and "
        f"{ceiling['bytes'] / 1e9:,.1f} GB/s, the fastest matrix product and copy in the same run. "
        f"Furthest from it in the first column: {lacking}."
    )
    if any("-winograd" in record["contender"]["name"] for record in shown):
        note += " Winograd computes fewer products than are counted here, so its share may be above 100 %."
    head = ["graph", "GFLOP", "MiB", "limit", *map(marked, shown)]
    return Table("Share of the hardware's limit", head, rows, note)


def _reached(record: Record, network: str) -> str:
    """Return milliseconds and the share; of a request captured whole nothing, as its networks have no times."""
    entry = record["roofline"][network]
    if not entry["seconds"]:
        return DASH
    unknown = in_bf16(record["contender"]["name"]) and "flops_bf16" not in record["ceiling"]
    return _ms(entry["seconds"]) + ("" if unknown else f" ({entry['share_of_limit']:.0%})")


def _partition(group: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    ours = [record for record in group if record["contender"]["name"].startswith("latentrt/")]
    return ours, [record for record in group if record not in ours]


def scenario_table(group: Sequence[Record]) -> Table:
    """Return MLPerf's scenarios."""
    rows = []
    for record in group:
        found = record.get("scenarios")
        if not found:
            continue
        offline, server = found["Offline"], found.get("Server")
        seen = server["confirmed"] if server else None
        met = f"{seen['p99_seconds']:.2f} s in {seen['requests']} requests" if seen else DASH
        rows.append(
            [
                marked(record),
                _ms(found["SingleStream"]["p90_seconds"]),
                f"{offline['images_per_second']:.3g} (batch {offline['batch']})",
                f"{server['rate']:.3g}" if server else DASH,
                met,
                f"{record['orchestration']['p50']:.2%}" if record.get("orchestration") else DASH,
                oracle_share(record),
            ]
        )
    bound = group[0]["workload"]["latency_bound"]
    note = (
        f"Server: requests a second, Poisson arrivals, of which 99 % are answered within {bound:g} s; the rate comes "
        "from a simulated queue, `seen p99` from real requests at that rate. `orchestration`: share of a request "
        "outside the three networks."
    )
    head = [
        "",
        "SingleStream p90, ms",
        "Offline, images/s",
        "Server, requests/s",
        "seen p99",
        "orchestration",
        "oracle",
    ]
    return Table("Scenarios", head, rows, note)


def scaling_table(group: Sequence[Record]) -> Table:
    """Return the fitted exponents of each axis."""
    rows = []
    for record in group:
        points, fits = record["points"], record["fits"]
        ends = f"{points[0]['x']:,.0f} to {points[-1]['x']:,.0f}"
        times = f"{_ms(points[0]['seconds'])} to {_ms(points[-1]['seconds'])}"
        grown = [_exponent(fits[name]) for name in ("request", "denoise", "memory")]
        rows.append([marked(record), record["axis"], ends, times, *grown])
    note = (
        "Exponents of a power law with their standard errors: 1 is linear. Memory is counted above the opened process."
    )
    return Table("Growth", ["", "with", "from", "request, ms", "request", "denoise", "memory"], rows, note)


def _exponent(fit: dict[str, Any] | None) -> str:
    return f"{fit['exponent']:.2f} ± {fit['error']:.2f}" if fit else DASH


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _s(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds:.2f}" if seconds < 100 else f"{seconds:,.0f}"
