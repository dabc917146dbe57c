"""Samplers of rectified-flow and consistency models, on shares of noise or angles."""

from __future__ import annotations

import numpy as np

from ..schedules import Options, Schedule
from .k_diffusion import churned
from .step_table import StepTable, TableBuilder

__all__ = ["flow_euler", "flow_heun", "flow_lcm", "scm"]


def flow_euler(schedule: Schedule, options: Options) -> StepTable:
    """Euler's method on a rectified flow (Liu et al. 2022); stochastic_sampling noises the clean estimate anew."""
    if options["stochastic_sampling"]:
        return flow_lcm(schedule, options)
    table, s = TableBuilder(), schedule.sigmas
    for i in range(schedule.start, len(schedule)):
        latents = table.latents + (s[i + 1] - s[i]) * table.prediction
        table.row(schedule.timesteps[i], latents, original=level(s[i], options))
    return table.table()


def flow_lcm(schedule: Schedule, options: Options) -> StepTable:
    """Consistency sampling on a rectified flow (Starodubcev et al. 2025, SwD): the clean estimate is noised anew."""
    table, s = TableBuilder(), schedule.sigmas
    for i in range(schedule.start, len(schedule)):
        x0 = table.latents - s[i] * table.prediction
        latents = (1 - s[i + 1]) * x0 + s[i + 1] * table.noise
        table.row(schedule.timesteps[i], latents, original=level(s[i], options), draw=True)
    return table.table()


def flow_heun(schedule: Schedule, options: Options) -> StepTable:
    """Heun's method on a rectified flow (Karras et al. 2022, algorithm 1); slots: first latents and first slope.

    With churn diffusers draws noise for the second evaluation too, and does not use it.
    """
    table, s, t = TableBuilder(history=2), schedule.sigmas, schedule.timesteps
    for i in range(schedule.start, len(schedule)):
        hat, start = churned(table, s[i], 2 * len(schedule) - 1, options)
        h, slope, draw = s[i + 1] - hat, s[i] / hat * table.prediction, bool(hat > s[i])
        table.row(t[i], start + h * slope, [start, slope], original=level(s[i], options), draw=draw)
        if s[i + 1] > 0:
            start, first = table.history
            latents = start + h * (first + table.prediction) / 2
            table.row(t[i + 1], latents, original=level(s[i + 1], options), draw=draw)
    return table.table()


def scm(schedule: Schedule, options: Options) -> StepTable:
    """Multistep consistency sampling on a circle (Lu and Song 2024; Chen et al. 2025, SANA-Sprint).

    Latents and predictions are in units of the data's deviation, so that `sigma_data` appears nowhere.
    """
    table, t = TableBuilder(), schedule.sigmas
    cos, sin = np.cos(t), np.sin(t)
    for i in range(schedule.start, len(schedule)):
        x0 = cos[i] * table.latents - sin[i] * table.prediction
        latents = cos[i + 1] * x0 + sin[i + 1] * table.noise
        table.row(t[i], latents, original=(float(cos[i]), float(sin[i])), draw=True)
    return table.table()


def level(sigma: float, options: Options) -> tuple[float, float]:
    """Return the signal and noise factors at `sigma`, a share of noise, or of signal with `invert_sigmas`."""
    return (sigma, 1 - sigma) if options.get("invert_sigmas") else (1 - sigma, sigma)
