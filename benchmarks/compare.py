"""`latentrt bench compare A B`: what changed beyond noise between two sets of records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

from .records import Record, latest
from .samples import Ratio, ratio

TOLERANCE = 0.04
"""A change must be surely larger than this share."""
FLOOR_SECONDS = 50e-6
"""Changes below this are not reported: the clock, the scheduler and the garbage collector make as much."""
DRIFT = 0.02
"""A change of the machine's speed that is worth a note."""
FEWEST = 3
MEMORY_TOLERANCE = 0.05
MEMORY_FLOOR = 16 * 2**20


@dataclass(frozen=True)
class Change:
    """One figure of one contender that changed beyond noise; `before` and `after` are medians in the figure's unit."""

    work: str
    contender: str
    figure: str
    before: float
    after: float
    low: float
    high: float
    """Bounds of `after / before` at 99 % confidence."""

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

    @property
    def regressed(self) -> bool:
        """Whether anything is worse."""
        return any(change.worse for change in self.changes)


def compare(before: Iterable[Record], after: Iterable[Record]) -> Comparison:
    """Compare the newest records of the same work and contender in both sets, stage by stage."""
    old, new = latest(before), latest(after)
    shared = [key for key in old if key in new]
    changes: list[Change] = []
    doubts: dict[str, None] = {}
    for key in shared:
        changes += _changes(old[key], new[key])
        doubts |= dict.fromkeys(_doubts(old[key], new[key]))
    return Comparison(changes, len(shared), list(doubts))


def _changes(old: Record, new: Record) -> list[Change]:
    """Return what changed, the stages that changed most first and the whole request before them."""
    found = []
    drift = _drift(old, new)
    for figure, samples in old["samples"].items():
        again = [value / drift for value in new["samples"].get(figure, [])]
        if min(len(samples), len(again)) < FEWEST or min(*samples, *again) <= 0:
            continue
        changed = ratio(samples, again)
        sure = changed.low > 1 + TOLERANCE or changed.high < 1 - TOLERANCE
        before, after = _launch_medians(old, samples), _launch_medians(new, again)
        apart = min(after) > max(before) or max(after) < min(before)  # in every process, not just in one
        if sure and apart and abs(median(again) - median(samples)) > FLOOR_SECONDS:
            found.append(_change(old, figure, median(samples), median(again), changed))
    found.sort(key=lambda change: (change.figure != "total", -abs(change.after - change.before)))
    held, holds = (record["memory"]["peak_bytes"] for record in (old, new))
    if abs(holds - held) > max(MEMORY_FLOOR, MEMORY_TOLERANCE * held):
        found.append(_change(old, "peak memory", held, holds, Ratio(holds / held, holds / held, holds / held)))
    return found


def _drift(old: Record, new: Record) -> float:
    """Return how much longer a fixed piece of work took in the later run: the machine's doing, not the program's."""
    if not (old.get("yardstick") and new.get("yardstick")):
        return 1.0
    return median(new["yardstick"]) / median(old["yardstick"])


def _launch_medians(record: Record, samples: Sequence[float]) -> list[float]:
    """Return the median of each process's samples."""
    ends = [0, *accumulate(record.get("launches", [len(samples)]))]
    return [median(samples[start:end]) for start, end in pairwise(ends) if end > start]


def _change(record: Record, figure: str, before: float, after: float, changed: Ratio) -> Change:
    work = record["workload"]
    name = f"{work['name']}, {work['steps']} steps, batch {work['batch']}"
    return Change(name, record["contender"]["name"], figure, before, after, changed.low, changed.high)


def _doubts(old: Record, new: Record) -> Iterable[str]:
    """Yield what makes two records less comparable than they should be."""
    if abs(_drift(old, new) - 1) > DRIFT:
        yield f"the machine took {_drift(old, new) - 1:+.1%} for fixed work in the second run; its times are corrected"
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
    for change in comparison.changes:
        unit, scale = ("MiB", 2**20) if change.figure == "peak memory" else ("ms", 1e-3)
        verdict = "slower" if change.worse else "faster"
        verdict = {"slower": "more", "faster": "less"}[verdict] if unit == "MiB" else verdict
        out.append(
            f"{change.work} · {change.contender} · {change.figure}: {change.before / scale:,.4g} → "
            f"{change.after / scale:,.4g} {unit}, {change.after / change.before - 1:+.1%} {verdict} "
            f"(99 % sure of {change.low - 1:+.1%} to {change.high - 1:+.1%})"
        )
    if not comparison.changes:
        out.append(f"no change beyond noise in {comparison.compared} contenders")
    return out
