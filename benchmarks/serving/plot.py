"""Latency against rate for every way to share a device, as a PNG."""

from __future__ import annotations

import io

from matplotlib import ticker
from matplotlib.figure import Figure

from .mixes import Mix
from .simulate import POLICIES, Policy, Setup, saturation, simulate

COLORS = dict(zip(POLICIES, ("#2f6f9f", "#9aa5b1", "#c8553d", "#e0a458"), strict=True))
POINTS = 14
REQUESTS = 6000


def latency(setup: Setup, mix: Mix, *, rate: float | None = None, p99: float | None = None) -> bytes:
    """Draw the 99th percentile of latency against the rate of one device; a mark where a plan puts it, a line for p99.

    Points at which more than one in a hundred requests is turned away are left out.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    most = max(saturation(policy, setup, mix, requests=REQUESTS).throughput() for policy in POLICIES)
    rates = [most * (number + 1) / POINTS for number in range(POINTS)]
    for policy in POLICIES:
        seen = [(each, simulate(policy, setup, mix, each, requests=REQUESTS).latency(99)) for each in rates]
        drawn = [(x, y) for x, y in seen if y != float("inf")]
        style = {"linewidth": 2.2, "zorder": 3} if policy == "in-flight" else {"linewidth": 1.4}
        axes.plot(*zip(*drawn, strict=True), "o-", color=COLORS[policy], markersize=4, label=_title(policy), **style)  # type: ignore[arg-type]
    if p99 is not None:
        axes.axhline(p99, color="#52606d", linewidth=1, linestyle=":")
        axes.annotate(f"wanted: {p99:g} s", (0, p99), (4, 3), textcoords="offset points", fontsize=8, color="#52606d")
    if rate is not None:
        axes.axvline(rate, color="#52606d", linewidth=1, linestyle="--")
        axes.annotate(
            f"plan: {rate:.3g}/s", (rate, 1), (4, -10), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color="#52606d",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(0, None)
    axes.set_xlabel("requests a second that one device gets")
    axes.set_ylabel("99 % are answered within, seconds")
    beyond = setup.curve.extrapolated(setup.rows)
    title = f"Simulated on {setup.curve.name} ({setup.curve.kind}), mix {mix.name}"
    axes.set_title("\n".join([title, *([beyond] if beyond else [])]), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.legend(fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _title(policy: Policy) -> str:
    return {"static equal": "static batches of equals", "static unlike": "static batches of unlike requests"}.get(
        policy, policy
    )
