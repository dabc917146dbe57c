"""What contenders that are not exact save, and what it costs: beside the exact run with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..quality.deltas import Cost
from .records import Record
from .table import DASH, NOT_EXACT, Table, marked

EXACT = "exact"
NEARNESS = ("PSNR", "worst", "SSIM", "HaarPSI", "pixels")


def quality_table(group: Sequence[Record]) -> Table:
    """Return, for each contender that is not exact, what it saves and how near its pictures are; the exact run first.

    No rows where no such contender was measured beside an exact one.
    """
    lossy = [record for record in group if record.get("quality")]
    leads = {record["quality"]["against"] for record in lossy}
    shown = [*(record for record in group if record["contender"]["name"] in leads), *lossy]
    rows = [_row(record, _lead(record, group)) for record in shown] if lossy else []
    counts = " or ".join(f"{count:,}" for count in sorted({record["quality"]["pictures"] for record in lossy}))
    note = (
        f"Against the first row, {counts} pictures of the same prompts and noise: PSNR in dB, of all together and of "
        "the worst; SSIM and HaarPSI (perceptual, no network) are means, 1 for equal pictures; `pixels`: largest "
        "difference, of 255. `calls`: evaluations of the denoiser, and `a call ×` the time of one; times are medians "
        "over rounds. `oracle`: pictures that show what was asked for."
    )
    head = ["", "time ×", "denoise ×", "calls", "a call ×", *NEARNESS, "oracle"]
    return Table("Quality", head, rows, note)


def costs_table(costs: Sequence[Cost]) -> Table:
    """Return what modes cost on a list of prompts, a row each; columns only of what was scored."""
    scored, lpips = list(costs[0].changes), costs[0].lpips is not None
    rows = [
        [
            f"{NOT_EXACT} {cost.mode}",
            *_nearness(cost.near.as_record()),
            *([f"{cost.lpips:.4f}"] if lpips else []),
            *(f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in cost.changes.values()),
        ]
        for cost in costs
    ]
    note = (
        f"Against the exact run, {costs[0].near.pictures} pictures of the same prompts and noise: PSNR in dB, of all "
        "together and of the worst; `pixels`: largest difference, of 255."
    )
    if scored:
        note += " Scores: the mean change, and where it lies with 95 % (bootstrap over prompts)."
    head = ["", *NEARNESS, *(["LPIPS"] if lpips else []), *(f"{name} Δ" for name in scored)]
    return Table("", head, rows, note)


def oracle_share(record: Record) -> str:
    """Return the shares of pictures that the oracle finds right."""
    found = record.get("oracle")
    if not found:
        return DASH
    digits = 0 if found["count"] <= 200 else 1
    return f"{found['single']:.{digits}%} single, {found['pair']:.{digits}%} pairs"


def _lead(record: Record, group: Sequence[Record]) -> Record | None:
    """Return the record of the exact run that a contender took turns with."""
    against = record.get("quality", {}).get("against", record["contender"]["name"])
    return next((r for r in group if r["contender"]["name"] == against and r["run"] == record["run"]), None)


def _row(record: Record, lead: Record | None) -> list[str]:
    near, calls = record.get("quality"), _calls(record)
    times = [DASH] * 2 if lead is None else [f"{ratio(record, lead, stage):.2f} ×" for stage in ("total", "denoise")]
    each = DASH if lead is None else f"{ratio(record, lead, 'denoise') * _calls(lead) / calls:.2f} ×"
    return [marked(record), *times, str(calls), each, *_nearness(near), oracle_share(record)]


def _nearness(near: dict[str, Any] | None) -> list[str]:
    if near is None or near["psnr"] is None:
        return [EXACT if near is None else "equal", *[DASH] * 4]
    figures = [f"{near['psnr']:.1f}", f"{near['least_psnr']:.1f}", f"{near['ssim']:.4f}", f"{near['haarpsi']:.4f}"]
    return [*figures, str(near["max_pixel_difference"])]


def _calls(record: Record) -> int:
    return int(record["roofline"]["denoiser"]["runs"])


def ratio(record: Record, lead: Record, stage: str) -> float:
    """Return the median over rounds of a contender's seconds in a stage over those of another in the same round."""
    pairs = zip(record["samples"][stage], lead["samples"][stage], strict=False)  # until one of both failed
    return median(mine / theirs for mine, theirs in pairs)
