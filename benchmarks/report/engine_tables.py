"""Tables of what is measured with no contender beside it: the loop alone, and the building of engines."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record
from .table import DASH, Table, mib


def replay_table(found: Sequence[Record]) -> Table:
    """Return the loop's own time from one step to the next, newest record of each mode."""
    rows = []
    for (device, mode), record in {(r["device"], r["mode"]): r for r in found}.items():
        times = record["seconds_per_step"]
        kept = f"{record['python_bytes_left']}", f"{record['python_bytes_at_most']}"
        rows.append([f"{device}, {mode}", f"{times['p50'] * 1e6:.1f}", f"{times['p99'] * 1e6:.1f}", *kept])
    note = (
        "Microseconds a step of the loop itself, over engines that copy four bytes, and bytes of Python objects that a "
        "request leaves behind (the figure itself is one) or holds at a time."
    )
    return Table("Host time", ["", "p50", "p99", "bytes left", "bytes at most"], rows, note)


def compile_table(found: Sequence[Record]) -> Table:
    """Return the seconds that each graph's plans took to build, newest records only."""
    newest = {
        (r["bundle"]["name"], r["bundle"]["precision"], r["graph"], r["compute_capability"], r["profile"]): r
        for r in found
    }
    kinds = sorted({key[3:] for key in newest}, key=lambda kind: (float(kind[0]), kind[1] != "static"))
    rows = []
    for name in dict.fromkeys(key[:3] for key in newest):
        built = [newest.get((*name, *kind)) for kind in kinds]
        done = [r for r in built if r and "error" not in r]
        seconds = [DASH if r is None else "failed" if "error" in r else f"{r['build_seconds']:.2f}" for r in built]
        largest = [mib(max(r[what] for r in done)) if done else DASH for what in ("plan_bytes", "peak_bytes")]
        rows.append([f"{name[0]} {name[1]}, {name[2]}", *seconds, *largest])
    note = (
        "Seconds a plan, one process each, with an empty cache; `dynamic`: half to one and a half times the size; the "
        "largest plan and the most memory of a build. None of these plans has run: that takes a GPU."
    )
    head = ["", *(f"{capability} {kind}" for capability, kind in kinds), "plan", "memory"]
    return Table("Builds", head, rows, note)
