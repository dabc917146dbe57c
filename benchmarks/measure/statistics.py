"""What a list of samples says: percentiles, spread, and how it grows with something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def summarize(samples: Sequence[float]) -> dict[str, Any]:
    """Return count, mean, minimum, p50, p90, p99 and the spread: interquartile range over median."""
    values = np.asarray(samples, np.float64)
    p25, p50, p75, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99])
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "min": float(values.min()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "spread": float((p75 - p25) / p50) if p50 else 0.0,
    }


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent, fitted to logarithms; `error` is the exponent's standard error."""

    factor: float
    exponent: float
    error: float


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit a power law to at least three points by least squares of the logarithms."""
    from scipy.stats import linregress

    fit = linregress(np.log(x), np.log(y))
    return PowerLaw(float(np.exp(fit.intercept)), float(fit.slope), float(fit.stderr))
