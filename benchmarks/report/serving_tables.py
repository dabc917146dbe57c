"""Tables of servers under load: one for each mix on each device, a row for each way to share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .records import Record, by_machine
from .table import DASH, Table
from .tables import Section, command, conditions, threads_of

LOADS = (0.7, 0.9)
BASELINES = ("one at a time", "static equal")
TITLES = {"in-flight": "**in flight**", "static equal": "static, equals", "static unlike": "static, unlike"}

Found = dict[tuple[str, str, float | None], Record]
"""The newest record by policy, point and load (a share of the baselines' rate, or else the rate itself)."""


def serving_sections(records: Iterable[Record]) -> list[Section]:
    """Return a section for each machine, device, way of asking and mix, in the order in which they came first."""
    sections = []
    for group in by_machine(record for record in records if record["kind"] == "serving"):
        parts: dict[tuple[Any, ...], Found] = {}
        for record in group:
            engines, server = record["engines"], record["server"]
            key = (_device(record), record["curve"]["scale"], engines["bundle"], record["over"], record["mix"]["name"])
            found = parts.setdefault((*key, *server.values()), {})
            load = record["load"] or record["rate"] if record["point"] == "load" else None
            found[record["policy"], record["point"], load] = record
        sections += [_section(found) for found in parts.values()]
    return sections


def _section(found: Found) -> Section:
    records = list(found.values())
    newest = max(records, key=lambda record: str(record["date"]))
    title = f"Serving: {_device(newest)}, mix {newest['mix']['name']}"
    others = {command(record): None for record in records if command(record) != command(newest)}
    made = "".join(f"; `{each}`" for each in others)
    return Section(title, conditions(newest) + made, [serving_table(found)], [], records)


def _device(record: Record) -> str:
    curve, engines = record["curve"], record["engines"]
    if engines["paced"]:
        return f"paced by the curve {curve['name']} ({curve['kind']})"
    at = f" at {engines['size'].replace('x', '×')}" if engines.get("size") else ""
    threads = f", {threads_of(record)}" if record["conditions"]["device"] == "cpu" else ""
    return f"{engines['bundle']}{at} on {engines['backend']}{threads}"


def serving_table(found: Found) -> Table:
    """Return what each policy did at saturation, at two loads, and within bounds."""
    rows, best = [], _best(found)
    for policy in dict.fromkeys(policy for policy, _, _ in found):
        cells = [TITLES.get(policy, policy), *_saturation(found.get((policy, "saturation", None)), best)]
        for load in LOADS:
            cells += _latency(found.get((policy, "load", load)))
        rows.append([*cells, _bounded(found.get((policy, "bounded", None)))])
    first = next(iter(found.values()))
    curve, server, bound = first["curve"], first["server"], first["bound"]
    over = "over HTTP" if first["over"] == "http" else "in one process"
    head = ["", "images/s", "×", *(f"{what} at {load:.0%}" for load in LOADS for what in ("p50", "p99", "in bounds"))]
    paced = ""
    if first["engines"]["paced"]:
        scale = "" if curve["scale"] == 1 else f", at {curve['scale']:g} of its times, given back in its own"
        paced = f" No engine ran: steps slept as long as {curve['title']} ({curve['kind']}) takes{scale}."
        paced += f" Of these, {curve['extrapolated']}." if curve["extrapolated"] else ""
    note = (
        f"Poisson arrivals {over}, {server['queue']} may wait, {server['slots']} slots, {server['rows']} rows. "
        f"`images/s`: at saturation; `×`: of the better of one at a time and static batches of equals, of which the "
        f"loads are shares. Seconds; `in bounds`: requests answered within {bound:g} × their own time alone; `rate in "
        f"bounds`: the highest at which 99 % are. In brackets what the simulation says of the same requests."
        f"{_further(found)}{paced}"
    )
    return Table("Serving", [*head, "rate in bounds"], rows, note)


def _best(found: Found) -> float | None:
    records = [found[policy, "saturation", None] for policy in BASELINES if (policy, "saturation", None) in found]
    return max((record["seen"]["images_per_second"] for record in records), default=None)


def _saturation(record: Record | None, best: float | None) -> Sequence[str]:
    if record is None:
        return DASH, DASH
    seen, simulated = (record[name]["images_per_second"] for name in ("seen", "simulated"))
    return f"{seen:.3g} ({simulated:.3g})", f"{seen / best:.2f}" if best else DASH


def _latency(record: Record | None) -> Sequence[str]:
    if record is None:
        return DASH, DASH, DASH
    pairs = [(record["seen"]["latency"][name], record["simulated"]["latency"][name]) for name in ("p50", "p99")]
    within = record["seen"]["within_bound_share"], record["simulated"]["within_bound_share"]
    return *(f"{_number(seen)} ({_number(simulated)})" for seen, simulated in pairs), "{:.0%} ({:.0%})".format(*within)


def _bounded(record: Record | None) -> str:
    return DASH if record is None else f"{record['bounded_rate']:.3g} ({record['simulated_bounded_rate']:.3g})"


def _further(found: Found) -> str:
    """Return in words what was seen at rates that are no usual share of the baselines'."""
    rates: dict[float, list[str]] = {}
    for (policy, point, load), record in found.items():
        if point == "load" and load not in LOADS:
            seen, simulated = (record[name]["within_bound_share"] for name in ("seen", "simulated"))
            rates.setdefault(record["rate"], []).append(f"{policy} {seen:.1%} ({simulated:.1%})")
    return "".join(f" In bounds at {rate:g} images/s: {', '.join(each)}." for rate, each in sorted(rates.items()))


def _number(seconds: float | None) -> str:
    return "refused" if seconds is None else f"{seconds:.3g}"
