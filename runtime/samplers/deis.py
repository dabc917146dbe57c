"""DEIS: exponential integrator with polynomials in log rho."""

from __future__ import annotations

import numpy as np

from ..schedules import Options, Schedule
from ..step_table import StepTable, TableBuilder
from .dpm_solver import levels
from .predictions import clean_and_noise

__all__ = ["deis"]


def deis(schedule: Schedule, options: Options) -> StepTable:
    """DEIS with polynomials in log rho (Zhang and Chen 2023, equation 18); slots: past epsilons."""
    level, order, n = levels(schedule, options), int(options["solver_order"]), len(schedule)
    short = options["lower_order_final"] and n < 15
    table = TableBuilder(history=order - 1)
    for i in range(schedule.start, n):
        s, t = level[i], level[i + 1]
        _, epsilon = clean_and_noise(options["prediction_type"], table.latents, table.prediction, s.signal, s.noise)
        now = [epsilon, *table.history]
        used = min(order, i - schedule.start + 1, n - i if short else order)
        log_rhos = np.array([-past.half_log_snr for past in level[i::-1][:used]])
        factors = log_polynomial_integrals(log_rhos, -s.half_log_snr, -t.half_log_snr)
        moved = table.latents / s.signal + sum(factor * past for factor, past in zip(factors, now, strict=False))
        known = (float(s.signal), float(s.noise))
        table.row(schedule.timesteps[i], t.signal * moved, now[: order - 1], known=known)
    return table.table()


def log_polynomial_integrals(nodes: np.ndarray, first: float, last: float) -> list[float]:
    """Integrate the Lagrange polynomials l_j(y) of `nodes`, y = log rho, over rho: l_j(y) exp(y) dy, `first` to `last`.

    A polynomial p times exp(y) has the antiderivative (p - p' + p'' - ..) exp(y).
    """
    integrals = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        lagrange = np.poly1d(np.poly(others - first) / np.prod(node - others))  # of y - first: small numbers
        primitive = lagrange - lagrange.deriv() + lagrange.deriv(2)
        integrals.append(float(np.exp(first) * (primitive(last - first) * np.exp(last - first) - primitive(0))))
    return integrals
