"""DEIS: exponential integrator with polynomials in log rho."""

from __future__ import annotations

import numpy as np

from ..schedules import Options, Schedule
from .algebra import quadrature_factors
from .dpm_solver import converted, levels
from .step_table import StepTable, TableBuilder

__all__ = ["deis"]


def deis(schedule: Schedule, options: Options) -> StepTable:
    """DEIS with polynomials in log rho (Zhang and Chen 2023, equation 18); slots: past epsilons."""
    level, order, n = levels(schedule, options), int(options["solver_order"]), len(schedule)
    short = options["lower_order_final"] and n < 15
    table = TableBuilder(history=order - 1)
    for i in range(schedule.start, n):
        s, t = level[i], level[i + 1]
        now = [converted(table, s, options, data=False), *table.history]
        used = min(order, i - schedule.start + 1, n - i if short else order)
        log_rhos = [-past.half_log_snr for past in level[i::-1][:used]]
        factors = log_rho_factors(log_rhos, log_rhos[0], -t.half_log_snr)
        moved = table.latents / s.signal + sum(factor * past for factor, past in zip(factors, now, strict=False))
        original = (float(s.signal), float(s.noise))
        table.row(schedule.timesteps[i], t.signal * moved, now[: order - 1], original=original)
    return table.table()


def log_rho_factors(nodes: list[np.float64], first: np.float64, last: np.float64) -> np.ndarray:
    """Return the factors that integrate a polynomial in y = log rho, given at `nodes`, over rho from `first` to `last`.

    The moments are those of u^k exp(u) over u = y - first from 0 to h, by parts; d rho = exp(y) dy.
    """
    h = last - first
    moments = [np.expm1(h)]
    for k in range(1, len(nodes)):
        moments.append(h**k * np.exp(h) - k * moments[-1])
    return np.exp(first) * quadrature_factors([node - first for node in nodes], moments)
