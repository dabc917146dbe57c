"""`latentrt bench compare A B`: what changed beyond noise between two sets of records.

On a machine that others use too, noise only adds: medians of the same program differ by a tenth from one minute to the
next, while the fastest requests of each process stay within a few percent. So processes are compared by their fastest.

Such a machine also changes its speed for minutes. A contender that is not latentrt and has the same version in both
runs cannot have changed: it is not judged, and what its requests took more or less is taken off the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

from .records import Record, latest

TOLERANCE = 0.04
"""The share by which all processes of a run must differ from all of the other; the same code twice stays below it."""
DRIFT_TOLERANCE = 0.25
"""What is added to it, as a share of the machine's own change: not all work is slowed alike."""
DRIFT, UNSURE = 0.02, 0.06
"""Changes of the machine that are worth a note, and that may hide a tenth in one stage."""
FLOOR_SECONDS = 50e-6
"""Changes below this are not reported: the clock, the scheduler and the garbage collector make as much."""
UNCORRECTED = 0.02
"""The share by which a figure must differ, in the same direction, before that correction: some work is not slowed."""
ALONE = "nothing that stayed the same was measured in both runs: changes of the machine itself are not told apart"
FEWEST = 3
MEMORY_TOLERANCE = 0.05
MEMORY_FLOOR = 16 * 2**20


@dataclass(frozen=True)
class Change:
    """One figure of one contender that changed beyond noise; `before` and `after` are the least seen, in its unit."""

    work: str
    contender: str
    figure: str
    before: float
    after: float
    least: float
    """How much larger it became at least: the closest two processes, one of each run; below 1 when it became less."""

    @property
    def worse(self) -> bool:
        """Whether the change is a regression; every figure is one of which less is better."""
        return self.after > self.before


@dataclass(frozen=True)
class Comparison:
    """What two sets of records say: changes, how many contenders were compared, and why to doubt them."""

    changes: list[Change]
    compared: int
    doubts: list[str]
    controls: list[str]
    """Contenders that are no part of latentrt and the same in both sets: they tell of the machine."""

    @property
    def regressed(self) -> bool:
        """Whether anything is worse."""
        return any(change.worse for change in self.changes)


def compare(before: Iterable[Record], after: Iterable[Record]) -> Comparison:
    """Compare the newest records of the same work and contender in both sets, stage by stage."""
    old, new = latest(before), latest(after)
    shared = [key for key in old if key in new]
    controls = [key for key in shared if _is_control(old[key], new[key])]
    judged = [key for key in shared if key not in controls] or shared
    changes: list[Change] = []
    doubts: dict[str, None] = {}
    for key in judged:
        same = [(old[c], new[c]) for c in controls if c not in judged and _work(c) == _work(key)]
        drift = median(_fastest(b) / _fastest(a) for a, b in same) if same else 1.0
        if not same:
            doubts |= {ALONE: None}
        elif abs(drift - 1) > DRIFT:
            again = "; measure again for a sure answer" if abs(drift - 1) > UNSURE else ""
            doubts |= {f"the machine took {drift - 1:+.1%} for what has not changed: corrected for that{again}": None}
        changes += _changes(old[key], new[key], drift)
        doubts |= dict.fromkeys(_doubts(old[key], new[key]))
    beside = dict.fromkeys(key[3] for key in controls if key not in judged)
    return Comparison(changes, len(judged), list(doubts), list(beside))


def _is_control(old: Record, new: Record) -> bool:
    """Tell whether a contender is somebody else's and the same in both records."""
    same = all(old["contender"][name] == new["contender"][name] for name in ("versions", "options"))
    return same and not old["contender"]["name"].startswith("latentrt/")


def _work(key: Sequence[str]) -> tuple[str, ...]:
    """Return a record's key without the contender."""
    return (*key[:3], *key[4:])


def _fastest(record: Record) -> float:
    return float(min(record["samples"]["total"]))


def _changes(old: Record, new: Record, drift: float) -> list[Change]:
    """Return what changed, the stages that changed most first and the whole request before them."""
    found = []
    tolerance = 1 + TOLERANCE + DRIFT_TOLERANCE * abs(drift - 1)
    for figure, samples in old["samples"].items():
        seen = new["samples"].get(figure, [])
        if min(len(samples), len(seen)) < FEWEST or min(*samples, *seen) <= 0:
            continue
        again = [value / drift for value in seen]
        raw = min(seen) / min(samples) - 1
        before, after = _fastest_of_processes(old, samples), _fastest_of_processes(new, again)
        if min(after) > max(before) * tolerance and raw > UNCORRECTED:
            least = min(after) / max(before)
        elif min(before) > max(after) * tolerance and raw < -UNCORRECTED:
            least = max(after) / min(before)
        else:
            continue
        if abs(min(after) - min(before)) > FLOOR_SECONDS:
            found.append(_change(old, figure, min(before), min(after), least))
    found.sort(key=lambda change: (change.figure != "total", -abs(change.after - change.before)))
    held, holds = (record["memory"]["peak_bytes"] for record in (old, new))
    if abs(holds - held) > max(MEMORY_FLOOR, MEMORY_TOLERANCE * held):
        found.append(_change(old, "peak memory", held, holds, holds / held))
    return found


def _fastest_of_processes(record: Record, samples: Sequence[float]) -> list[float]:
    """Return the least of each process's samples."""
    ends = [0, *accumulate(record.get("launches", [len(samples)]))]
    return [min(samples[start:end]) for start, end in pairwise(ends) if end > start]


def _change(record: Record, figure: str, before: float, after: float, least: float) -> Change:
    work = record["workload"]
    name = f"{work['name']}, {work['steps']} steps, batch {work['batch']}"
    return Change(name, record["contender"]["name"], figure, before, after, least)


def _doubts(old: Record, new: Record) -> Iterable[str]:
    """Yield what makes two records less comparable than they should be."""
    for name, record in (("first", old), ("second", new)):
        if not record["conditions"]["quiet"]:
            share = record["conditions"]["others_share"]
            yield f"others used {share:.0%} of the machine during the {name} run"
    if old["machine"] != new["machine"]:
        yield f"the machines differ: {_differences(old['machine'], new['machine'])}"
    if old["contender"]["versions"] != new["contender"]["versions"]:
        yield f"versions differ: {_differences(old['contender']['versions'], new['contender']['versions'])}"


def _differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    return "; ".join(f"{key} {a.get(key)} → {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key))


def lines(comparison: Comparison) -> list[str]:
    """Return a comparison as text, one line a change."""
    out = [f"note: {doubt}" for doubt in comparison.doubts]
    if comparison.controls:
        out.append(f"note: {', '.join(comparison.controls)}: the same in both, so a measure of the machine, not judged")
    for change in comparison.changes:
        unit, scale = ("MiB", 2**20) if change.figure == "peak memory" else ("ms", 1e-3)
        verdict = "slower" if change.worse else "faster"
        verdict = {"slower": "more", "faster": "less"}[verdict] if unit == "MiB" else verdict
        out.append(
            f"{change.work} · {change.contender} · {change.figure}: {change.before / scale:,.4g} → "
            f"{change.after / scale:,.4g} {unit}, {change.after / change.before - 1:+.1%} {verdict} "
            f"(between the closest processes {change.least - 1:+.1%})"
        )
    if not comparison.changes:
        contenders = "1 contender" if comparison.compared == 1 else f"{comparison.compared} contenders"
        out.append(f"no change beyond noise in {contenders}")
    return out
