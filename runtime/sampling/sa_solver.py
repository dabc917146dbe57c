"""SA-Solver: stochastic Adams methods, a predictor and a corrector that use each prediction twice."""

from __future__ import annotations

import numpy as np

from ..schedules import Options, Schedule
from .algebra import Form, original_at, quadrature_factors
from .dpm_solver import Level, converted, levels
from .step_table import StepTable, TableBuilder

__all__ = ["sa_solver"]

STOCHASTIC_FROM, STOCHASTIC_TO = 200, 800
"""The training timesteps between which tau is 1, and 0 elsewhere (Xue et al. 2023, section 6)."""


def sa_solver(schedule: Schedule, options: Options) -> StepTable:
    """SA-Solver (Xue et al. 2023, algorithm 1); slots: past converted predictions, the last latents and their noise."""
    level, n = levels(schedule, options), len(schedule)
    predictor, corrector = int(options["predictor_order"]), int(options["corrector_order"])
    past = max(predictor, corrector) - 1
    data, final = options["algorithm_type"] == "data_prediction", bool(options["lower_order_final"])
    table = TableBuilder(history=past + 2)
    order = 0  # of the corrector, set by the step before
    for i in range(schedule.start, n):
        *outputs, last, noise = table.history
        t = int(schedule.timesteps[i])
        prediction = converted(table, level[i], options, data=data)
        latents = table.latents
        if i > schedule.start:
            tau = tau_at(schedule.timesteps[i - 1])
            nodes = level[i::-1][:order]
            latents = adams(last, noise, [prediction, *outputs][:order], nodes, level[i - 1], level[i], tau, data)
        now = [prediction, *outputs]
        done = min(i - schedule.start, max(predictor, corrector - 1))
        order = min(corrector, n - i + 1 if final else corrector, done + 2)
        used = min(predictor, n - i if final else predictor, done + 1)
        nodes = level[i::-1][:used]
        moved = adams(latents, table.noise, now[:used], nodes, level[i], level[i + 1], tau_at(t), data)
        history = [*now[:past], latents, table.noise]
        table.row(t, moved, history, original=original_at(schedule.alphas_cumprod[t]), draw=True)
    return table.table()


def tau_at(timestep: float) -> float:
    """Return how much noise the step from a training timestep adds: 0 is the ODE, 1 the reverse SDE."""
    return float(STOCHASTIC_FROM <= timestep <= STOCHASTIC_TO)


def adams(
    start: Form, noise: Form, m: list[Form], nodes: list[Level], s: Level, t: Level, tau: float, data: bool
) -> Form:
    """Move `start` from level s to t with the predictions m at `nodes`; t is among them in the corrector.

    Equations 14 and 17 of the paper: the polynomial through the predictions is integrated against an exponential in
    half log SNR, here in u = half_log_snr - that of t.
    """
    h, rate = t.half_log_snr - s.half_log_snr, 1 + tau**2
    power = rate if data else -1.0
    moments = [-np.expm1(-power * h) / power]
    for k in range(1, len(m)):  # of u^k exp(power u) over u from -h to 0, by parts
        moments.append((-((-h) ** k) * np.exp(-power * h) - k * moments[-1]) / power)
    places = [node.half_log_snr - t.half_log_snr for node in nodes]
    factors = quadrature_factors(places, moments)
    if data and len(m) == 2:  # the authors' term for second order (their code; the paper's appendix C)
        length = h if nodes[0] is t else places[0] - places[1]
        term = (h**2 / 2 - (h * rate + np.expm1(-rate * h)) / rate**2) / length
        factors = factors + np.array([term, -term])
    moved = sum(factor * each for factor, each in zip(factors, m, strict=True))
    if data:
        carry, scale, spread = np.exp(-(tau**2) * h) * t.noise / s.noise, rate * t.signal, -np.expm1(-2 * tau**2 * h)
    else:
        carry, scale, spread = t.signal / s.signal, -rate * t.noise, tau**2 * np.expm1(2 * h)
    return carry * start + scale * moved + t.noise * np.sqrt(spread) * noise
