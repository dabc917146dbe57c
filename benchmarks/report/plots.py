"""Plots of records as PNG bytes: stages, the distribution of latency, and growth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from ..contenders import STAGES, is_exact
from .records import Record
from .summary import is_ours, made_on, title_of
from .table import marked

matplotlib.use("Agg")

COLORS = ("#9aa5b1", "#e0a458", "#c8553d", "#2f6f9f", "#588157", "#6d597a")
OURS, THEIRS = "#2f6f9f", "#b8c2cc"
WIDTH = 8.0


def section_plots(records: Sequence[Record], title: str) -> dict[str, bytes]:
    """Return the plots of one section's records by name."""
    if records[0]["kind"] == "scaling":
        return {
            f"growth-{axis.split()[0]}": growth(records, axis) for axis in dict.fromkeys(r["axis"] for r in records)
        }
    if records[0]["kind"] != "latency":
        return {}
    drawn = {"stages": stages(records, title), "latency": distribution(records, title)}
    return drawn | ({"quality": quality(records, title)} if any(r.get("quality") for r in records) else {})


def stages(records: Sequence[Record], title: str) -> bytes:
    """Draw one bar for each contender, its stages side by side."""
    figure, axes = _axes(0.42 * len(records) + 1.3, title)
    left = np.zeros(len(records))
    names = [marked(record) for record in records]
    for stage, color in zip(STAGES, COLORS, strict=True):
        widths = np.array([1e3 * record["seconds"][stage]["p50"] for record in records])
        axes.barh(names, widths, left=left, color=color, label=stage, height=0.62)
        left += widths
    for row, width in enumerate(left):
        axes.text(width, row, f" {width:,.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * left.max())
    axes.set_xlabel("milliseconds (medians of each stage)")
    figure.legend(ncols=len(STAGES), fontsize=8, frameon=False, loc="outside lower center")
    return _png(figure)


def rivals(records: Sequence[Record]) -> bytes:
    """Draw a request's time and the peak memory of each contender, two panels of bars; latentrt's stand out."""
    figure = Figure(figsize=(7.6, 0.44 * len(records) + 1.5), layout="constrained", facecolor="white")
    names = [marked(record, title_of(record)) for record in records]
    colors = [OURS if is_ours(record) else THEIRS for record in records]
    panels: tuple[tuple[str, list[float]], ...] = (
        ("request, milliseconds (median)", [1e3 * record["seconds"]["total"]["p50"] for record in records]),
        ("peak memory, MiB", [record["memory"]["peak_bytes"] / 2**20 for record in records]),
    )
    for axes, (label, values) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.barh(names, values, color=colors, height=0.68)
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:,.0f}", va="center", fontsize=12, weight="bold" if row == 0 else "normal")
        axes.set_xlim(0, 1.22 * max(values))
        axes.set_xlabel(label, fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.tick_params(axis="x", labelsize=10)
        axes.tick_params(axis="y", labelsize=12, length=0)
    axes.invert_yaxis()
    work = records[0]["workload"]
    size = f"{work['width']}×{work['height']}, {work['steps']} steps, {work['precision']}"
    figure.supxlabel(f"{work['name']} model, {size} · {made_on(records[0])}", fontsize=11, color="#52606d")
    return _png(figure, dpi=200)


def quality(records: Sequence[Record], title: str) -> bytes:
    """Draw a request's time against PSNR, a numbered point for each contender; whoever is exact is at the right edge.

    A line joins those that nobody beats in both.
    """
    shown = [record for record in records if is_exact(record["contender"]["name"]) or record.get("quality")]
    decibels = [(record.get("quality") or {}).get("psnr") for record in shown]
    seconds = [record["seconds"]["total"]["p50"] for record in shown]
    known = [value for value in decibels if value is not None] or [50.0]
    width = max(max(known) - min(known), 10.0)
    edge = max(known) + width / 6
    points = [(edge if value is None else value, 1e3 * time) for value, time in zip(decibels, seconds, strict=True)]
    figure, axes = _axes(4.0, title)
    front = sorted((a, b) for a, b in points if not any(c >= a and d < b for c, d in points))
    axes.plot(*zip(*front, strict=True), color=OURS, linewidth=0.8, alpha=0.5, zorder=1)
    axes.axvspan(edge - width / 20, edge + width / 3, color="#f0f4f8", zorder=0)
    for number, (record, place) in enumerate(zip(shown, beside(points, edge, width / 14), strict=True), 1):
        ours = is_ours(record)
        label = f"{number}  {marked(record)}, {place[1]:,.0f} ms"
        axes.plot(*place, "o", markersize=11, color=OURS if ours else THEIRS, label=label)
        axes.text(*place, str(number), fontsize=7, ha="center", va="center", color="white" if ours else "black")
    axes.set_yscale("log")
    _number(axes.yaxis)
    axes.set_xlim(min(known) - width / 20, edge + width / 3)
    ticks = [tick for tick in ticker.MaxNLocator(5, integer=True).tick_values(min(known), max(known)) if tick < edge]
    axes.set_xticks([*ticks, edge], [*(f"{tick:g}" for tick in ticks), "exact"])
    axes.set_xlabel("PSNR against the exact run with the same noise, dB")
    axes.set_ylabel("request, milliseconds (median)")
    figure.legend(fontsize=7, frameon=False, loc="outside right upper", handlelength=1, markerscale=0.5)
    return _png(figure)


def beside(points: Sequence[tuple[float, float]], edge: float, width: float) -> list[tuple[float, float]]:
    """Return points with those at the edge moved to its right while they would hide one another, times within 8 %."""
    placed: list[tuple[float, float]] = []
    for x, y in points:
        while x >= edge and any(abs(x - a) < width and abs(y / b - 1) < 0.08 for a, b in placed):
            x += width
        placed.append((x, y))
    return placed


def distribution(records: Sequence[Record], title: str) -> bytes:
    """Draw the share of requests answered within a time, for each contender."""
    figure, axes = _axes(3.2, title)
    for record in records:
        values = np.sort(record["samples"]["total"]) * 1e3
        axes.step(values, (np.arange(len(values)) + 1) / len(values), where="post", label=marked(record))
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of requests within")
    axes.set_ylim(0, 1.02)
    axes.set_xscale("log")
    _number(axes.xaxis)
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return _png(figure)


def growth(records: Sequence[Record], axis: str) -> bytes:
    """Draw seconds against one axis, both logarithmic, with the fitted exponents."""
    figure, axes = _axes(3.2, f"request against {axis}")
    ticks: list[float] = []
    for record in records:
        if record["axis"] != axis:
            continue
        x = [point["x"] for point in record["points"]]
        ticks = x
        fit = record["fits"]["request"]
        label = f"{record['contender']['title']}, exponent {fit['exponent']:.2f}"
        axes.plot(x, [1e3 * point["seconds"] for point in record["points"]], "o-", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{value:,.0f}" for value in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    _number(axes.yaxis)
    axes.set_xlabel(axis)
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=7, frameon=False)
    return _png(figure)


def _number(axis: Any) -> None:
    """Write plain numbers at a few round places of a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _axes(height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Figure, dpi: int = 130) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
