"""MLPerf Inference's scenarios by their names: SingleStream, Offline and Server.

The highest rate that the Server scenario allows is found on a queue that is simulated with the measured service times,
then confirmed with real requests that arrive at that rate; finding it with real requests would take hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ARRIVALS = 20_000
FEWEST = 5
"""Requests below which a real run at the rate would say nothing."""
HEADROOM = 0.98
"""The real requests arrive at this share of the simulated rate: it lies on the edge of the bound."""


def single_stream(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the scenario's figure, the 90th percentile of latency with one request at a time."""
    return {"p90_seconds": float(np.percentile(seconds, 90)), "requests": len(seconds)}


def offline(batches: Sequence[int], run: Callable[[int], float]) -> dict[str, Any]:
    """Return the highest images per second over batch sizes; `run(batch)` returns the seconds of one batch.

    Each size runs once to warm up and is measured twice.
    """
    rates = {}
    for batch in batches:
        run(batch)
        rates[batch] = 2 * batch / (run(batch) + run(batch))
    best = max(rates, key=lambda batch: rates[batch])
    return {"images_per_second": rates[best], "batch": best, "by_batch": {str(b): r for b, r in rates.items()}}


def server(service: Sequence[float], bound: float, duration: float, run: Callable[[], object]) -> dict[str, Any]:
    """Return the highest rate of Poisson arrivals that keeps the 99th percentile of latency within `bound` seconds.

    `service` are measured service times; `run()` answers one request. The rate is confirmed with real requests for
    about `duration` seconds; where these would be too few to say anything, `confirmed` is None.
    """
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(service, np.float64), ARRIVALS)
    gaps = rng.exponential(size=ARRIVALS)
    rate = highest_rate(drawn, gaps, bound)
    report: dict[str, Any] = {"bound_seconds": bound, "simulated_rate": rate}
    if rate == 0:
        return {**report, "rate": 0.0, "confirmed": None}
    offered = HEADROOM * rate
    requests = int(duration * offered)
    if requests < FEWEST:
        return {**report, "rate": offered, "confirmed": None}
    latencies = _serve(gaps[:requests] / offered, run)
    p99 = float(np.percentile(latencies, 99))
    confirmed = {"rate": offered, "requests": len(latencies), "p99_seconds": p99, "met": p99 <= bound}
    return {**report, "rate": offered, "confirmed": confirmed}


def highest_rate(service: Floats, gaps: Floats, bound: float) -> float:
    """Return the highest rate whose 99th percentile of waiting and service stays within `bound`, 0 if none does.

    `gaps` are exponential with mean one; bisection on the load between nothing and all of the server.
    """

    def meets(load: float) -> bool:
        return bool(np.percentile(latencies(service, gaps * service.mean() / load), 99) <= bound)

    low, high = 1e-3, 1.0
    if not meets(low):
        return 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return float(low / service.mean())


def latencies(service: Floats, gaps: Floats) -> Floats:
    """Return waiting plus service of each request in a first-come queue; `gaps[i]` is the time before arrival i.

    Lindley's recursion W[i+1] = max(0, W[i] + S[i] − A[i+1]) in closed form: a cumulative sum less its running minimum.
    """
    walk = np.concatenate([[0.0], np.cumsum(service[:-1] - gaps[1:])])
    waiting: Floats = walk - np.minimum.accumulate(walk)
    return waiting + service


def _serve(gaps: Floats, run: Callable[[], object]) -> list[float]:
    """Answer requests that arrive after the given gaps, one at a time, and return their latencies."""
    seen = []
    arrival = time.perf_counter()
    for gap in gaps:
        arrival += gap
        time.sleep(max(0.0, arrival - time.perf_counter()))
        run()
        seen.append(time.perf_counter() - arrival)
    return seen
