"""DPM-Solver and DPM-Solver++, multistep and singlestep, as exponential integrators in half log SNR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..schedules import Options, Schedule
from .algebra import Form, clean_and_noise, limited, preconditioned
from .step_table import StepTable, TableBuilder

__all__ = ["Level", "dpm_multistep", "dpm_singlestep", "levels"]


@dataclass(frozen=True)
class Level:
    """A noise level: latents = signal * x0 + noise * epsilon; half_log_snr = log(signal / noise)."""

    signal: np.float64
    noise: np.float64
    half_log_snr: np.float64


def levels(schedule: Schedule, options: Options) -> list[Level]:
    """Return the n + 1 levels of a schedule: variance preserving, a straight flow, or unscaled (preconditioned)."""
    result = []
    for sigma in schedule.sigmas:
        signal, noise = np.float64(1), sigma
        if options.get("use_flow_sigmas"):
            signal = 1 - sigma
        elif "sigma_data" not in options:
            signal = (sigma**2 + 1) ** -0.5
            noise = sigma * signal
        with np.errstate(divide="ignore"):
            result.append(Level(signal, noise, np.log(signal) - np.log(noise)))
    return result


def dpm_multistep(schedule: Schedule, options: Options) -> StepTable:
    """DPM-Solver(++) multistep (Lu et al. 2022, algorithms 1 and 2; SDE variants after Lu et al. 2022b, section 4)."""
    level, order, n = levels(schedule, options), int(options["solver_order"]), len(schedule)
    short = options["lower_order_final"] and n < 15
    table = TableBuilder(history=order - 1)
    for i in range(schedule.start, n):
        now = [converted(table, level[i], options, data=is_data(options)), *table.history]
        used = min(order, i - schedule.start + 1)
        if i == n - 1 and (short or options["euler_at_final"] or options["final_sigmas_type"] == "zero"):
            used = 1
        elif i == n - 2 and short:
            used = min(used, 2)
        if level[i + 1] == level[i]:
            used = 1  # a repeated final sigma: a step of no length, which higher orders would divide by
        differences = multistep_differences(now[:used], level[i + 1], level[i::-1][:used])
        midpoint = used == 2 and options["solver_type"] == "midpoint"
        latents = exponential_step(
            table, table.latents, level[i], level[i + 1], differences, options, midpoint=midpoint
        )
        original = (float(level[i].signal), float(level[i].noise))
        scale = (level[i].noise ** 2 + options["sigma_data"] ** 2) ** -0.5 if "sigma_data" in options else 1.0
        history, draw = now[: order - 1], is_sde(options)
        table.row(schedule.timesteps[i], latents, history, original=original, input_scale=scale, draw=draw)
    return table.table((options["sigma_max"] ** 2 + 1) ** 0.5 if "sigma_data" in options else 1.0)


def dpm_singlestep(schedule: Schedule, options: Options) -> StepTable:
    """DPM-Solver(++) singlestep (Lu et al. 2022, algorithms 4 and 5): groups of `solver_order` rows share an anchor.

    Slots: the past converted predictions, then the anchor latents.
    """
    level, order, n = levels(schedule, options), int(options["solver_order"]), len(schedule)
    orders = singlestep_orders(n, options)
    table = TableBuilder(history=order if order > 1 else 0)
    for i in range(schedule.start, n):
        now = [converted(table, level[i], options, data=is_data(options)), *table.history[: order - 1]]
        used = min(orders[i], i - schedule.start + 1)
        anchor = table.latents if used == 1 else table.history[order - 1]
        differences = singlestep_differences(now[:used], level[i + 1], level[i::-1][:used], options)
        midpoint = used == 2 and options["solver_type"] == "midpoint"
        latents = exponential_step(
            table, anchor, level[i - used + 1], level[i + 1], differences, options, midpoint=midpoint
        )
        original = (float(level[i].signal), float(level[i].noise))
        history = [*now[: order - 1], anchor] if order > 1 else []
        table.row(schedule.timesteps[i], latents, history, original=original, draw=is_sde(options))
    return table.table()


def multistep_differences(m: list[Form], t: Level, s: list[Level]) -> list[Form]:
    """Return D0, D1, D2 at the newest of the levels s[0] > s[1] > .., from the converted predictions m there."""
    if len(m) == 1:
        return m
    h = t.half_log_snr - s[0].half_log_snr
    r0 = (s[0].half_log_snr - s[1].half_log_snr) / h
    d1_0 = (m[0] - m[1]) / r0
    if len(m) == 2:
        return [m[0], d1_0]
    r1 = (s[1].half_log_snr - s[2].half_log_snr) / h
    d1_1 = (m[1] - m[2]) / r1
    return [m[0], d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1), (d1_0 - d1_1) / (r0 + r1)]


def singlestep_differences(m: list[Form], t: Level, s: list[Level], options: Options) -> list[Form]:
    """Return D0, D1, D2 at the oldest of the levels s[0] > s[1] > .., from the converted predictions m there."""
    if len(m) == 1:
        return m
    h = t.half_log_snr - s[-1].half_log_snr
    r0 = (s[0].half_log_snr - s[-1].half_log_snr) / h
    d1_newest = (m[0] - m[-1]) / r0
    if len(m) == 2:
        return [m[1], d1_newest]
    if options["solver_type"] == "midpoint":
        return [m[2], d1_newest]
    r1 = (s[1].half_log_snr - s[2].half_log_snr) / h
    d1_middle = (m[1] - m[2]) / r1
    return [m[2], (r0 * d1_middle - r1 * d1_newest) / (r0 - r1), 2 * (d1_newest - d1_middle) / (r0 - r1)]


def singlestep_orders(n: int, options: Options) -> list[int]:
    """Return the order of each row: 1, 2, .. repeated, and lowered at the end of a run that ends early or at zero."""
    order, to_zero = int(options["solver_order"]), options["final_sigmas_type"] == "zero"
    lower_final = options["lower_order_final"] or n % order != 0 or to_zero
    orders = [i % order + 1 for i in range(n)]
    if lower_final and n % order == 0 and order > 1:
        orders[-order:] = [1, 2, 1] if order == 3 else [1, 1]
    if to_zero:
        orders[-1] = 1
    return orders


def is_data(options: Options) -> bool:
    """Tell whether the algorithm extrapolates x0 rather than epsilon."""
    return str(options["algorithm_type"]).endswith("++")


def is_sde(options: Options) -> bool:
    """Tell whether the algorithm adds noise at every step."""
    return str(options["algorithm_type"]).startswith("sde-")


def converted(table: TableBuilder, level: Level, options: Options, *, data: bool) -> Form:
    """Return what the solver extrapolates: x0 when it works on data (the ++ variants), else epsilon."""
    if "sigma_data" in options:
        sigma_data = options["sigma_data"]
        x0 = preconditioned(options["prediction_type"], table.latents, table.prediction, level.noise, sigma_data)
        return limited(table, x0, options)
    x0, epsilon = clean_and_noise(
        options["prediction_type"], table.latents, table.prediction, level.signal, level.noise
    )
    if options.get("thresholding") and options.get("predict_x0", True):
        x0 = limited(table, x0, options)
        epsilon = (table.latents - level.signal * x0) / level.noise
    return x0 if data else epsilon


def exponential_step(
    table: TableBuilder, start: Form, s: Level, t: Level, differences: list[Form], options: Options, *, midpoint: bool
) -> Form:
    """Move `start` from level s to t: carry x - scale (phi1 D0 + phi2 D1 + phi3 D2) + spread * noise.

    All four algorithms share this form (Lu et al. 2022b, equation 9); they differ in carry, scale and the argument z
    of the phi functions. `differences` are D0, D1, D2: the converted prediction and its scaled derivatives in half log
    SNR. `midpoint` takes phi1 / 2 for phi2.
    """
    h = t.half_log_snr - s.half_log_snr
    carry, scale, z, spread = {
        "dpmsolver": (t.signal / s.signal, t.noise, h, 0.0),
        "dpmsolver++": (t.noise / s.noise, t.signal, -h, 0.0),
        "sde-dpmsolver": (t.signal / s.signal, 2 * t.noise, h, np.sqrt(np.exp(2 * h) - 1)),
        "sde-dpmsolver++": (t.noise / s.noise * np.exp(-h), t.signal, -2 * h, np.sqrt(1 - np.exp(-2 * h))),
    }[options["algorithm_type"]]
    x = carry * start - scale * np.expm1(z) * differences[0] + t.noise * spread * table.noise
    if len(differences) > 1:
        phi2 = np.expm1(z) / 2 if midpoint else np.expm1(z) / z - 1
        x = x - scale * phi2 * differences[1]
    if len(differences) > 2:
        # diffusers adds one to phi3 in the stochastic solver; its pictures are the reference
        extra = 1.0 if options["algorithm_type"] == "sde-dpmsolver++" else 0.0
        x = x - scale * ((np.expm1(z) - z) / z**2 - 0.5 + extra) * differences[2]
    return x
