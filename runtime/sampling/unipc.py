"""UniPC: a multistep predictor whose corrector uses each prediction twice."""

from __future__ import annotations

import numpy as np

from ..schedules import Options, Schedule
from .algebra import Form, quadrature_factors
from .dpm_solver import Level, converted, levels
from .step_table import StepTable, TableBuilder

__all__ = ["unipc"]


def unipc(schedule: Schedule, options: Options) -> StepTable:
    """UniPC (Zhao et al. 2023, algorithms 1 to 4); slots: past converted predictions, the last corrected latents."""
    level, order, n = levels(schedule, options), int(options["solver_order"]), len(schedule)
    table = TableBuilder(history=order + 1)
    used = 1
    for i in range(schedule.start, n):
        *past, corrected = table.history
        prediction = converted(table, level[i], options, data=bool(options["predict_x0"]))
        latents = table.latents
        if i > schedule.start and i - 1 not in options["disable_corrector"]:
            latents = unified_step(corrected, past[:used], level[i], level[i - 1 :: -1][:used], options, prediction)
        now = [prediction, *past]
        used = min(order, i - schedule.start + 1, n - i if options["lower_order_final"] else order)
        if level[i + 1] == level[i]:
            used = 1  # a repeated final sigma: a step of no length, which higher orders would divide by
        next_latents = unified_step(latents, now[:used], level[i + 1], level[i::-1][:used], options)
        original = (float(level[i].signal), float(level[i].noise))
        table.row(schedule.timesteps[i], next_latents, [*now[:order], latents], original=original)
    return table.table()


def unified_step(
    start: Form, m: list[Form], t: Level, s: list[Level], options: Options, prediction: Form | None = None
) -> Form:
    """Move `start` from level s[0] to t with the predictions m at s[0], s[1], .. (UniP) or one more (UniC)."""
    data = bool(options["predict_x0"])
    h = t.half_log_snr - s[0].half_log_snr
    z = -h if data else h
    carry, scale = (t.noise / s[0].noise, t.signal) if data else (t.signal / s[0].signal, t.noise)
    ratios = [(other.half_log_snr - s[0].half_log_snr) / h for other in s[1:]]
    slopes = [(other - m[0]) / ratio for other, ratio in zip(m[1:], ratios, strict=True)]
    if prediction is not None:
        ratios, slopes = [*ratios, np.float64(1)], [*slopes, prediction - m[0]]
    step = carry * start - scale * np.expm1(z) * m[0]
    if not slopes:
        return step
    base = z if options["solver_type"] == "bh1" else np.expm1(z)
    halved = len(m) == 1 or (len(m) == 2 and prediction is None)  # the lowest order needs no system
    factors = np.array([0.5]) if halved else quadrature_factors(ratios, moments(len(ratios), z, base))
    return step - scale * base * sum(factor * slope for factor, slope in zip(factors, slopes, strict=True))


def moments(count: int, z: np.float64, base: np.float64) -> list[np.float64]:
    """Return k! phi_(k+1)(z) / B(z), k = 1, 2, ..: the right side of Zhao et al. 2023, equation 9."""
    phi, factorial, right = np.expm1(z) / z - 1, 1, []
    for k in range(1, count + 1):
        right.append(phi * factorial / base)
        factorial *= k + 1
        phi = phi / z - 1 / factorial
    return right
