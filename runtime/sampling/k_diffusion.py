"""Samplers on dx/dsigma = (x - x0) / sigma, latents scaled as x0 + sigma * noise (Karras et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..schedules import Options, Schedule
from ..schedules.diffusion import timestep_at
from .algebra import Form, clean_and_noise, preconditioned, quadrature_factors
from .step_table import StepTable, TableBuilder

__all__ = [
    "churned",
    "close_row",
    "consistency",
    "consistent",
    "euler",
    "euler_ancestral",
    "first_sigma",
    "heun",
    "kdpm2",
    "kdpm2_ancestral",
    "lms",
]


def euler(schedule: Schedule, options: Options) -> StepTable:
    """Euler's method (Karras et al. 2022, algorithm 1), on preconditioned networks as well.

    Churn adds its noise after the network was asked, as diffusers does.
    """
    table, s = TableBuilder(), schedule.sigmas
    for i in range(schedule.start, len(schedule)):
        hat, start = churned(table, s[i], len(schedule), options)
        latents = start + (s[i + 1] - hat) * slope_at(table, s[i], options, start, hat)
        close_row(table, schedule.timesteps[i], s[i], latents, draw=bool(hat > s[i]), unit=unit_of(options))
    return table.table(first_sigma(schedule, options))


def euler_ancestral(schedule: Schedule, options: Options) -> StepTable:
    """Euler down to sigma_down, then fresh noise up to the next sigma (k-diffusion's ancestral step)."""
    table, s = TableBuilder(), schedule.sigmas
    for i in range(schedule.start, len(schedule)):
        down, up = ancestral(s[i], s[i + 1])
        latents = table.latents + (down - s[i]) * slope_at(table, s[i], options) + up * table.noise
        close_row(table, schedule.timesteps[i], s[i], latents, draw=True)
    return table.table(first_sigma(schedule, options))


def heun(schedule: Schedule, options: Options) -> StepTable:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); slots: the step's first latents and first slope."""
    table, s, t = TableBuilder(history=2), schedule.sigmas, schedule.timesteps
    for i in range(schedule.start, len(schedule)):
        h = s[i + 1] - s[i]
        slope = slope_at(table, s[i], options)
        close_row(table, t[i], s[i], table.latents + h * slope, [table.latents, slope])
        if s[i + 1] > 0:
            start, first = table.history
            slope = slope_at(table, s[i + 1], options)
            close_row(table, t[i + 1], s[i + 1], start + h * (first + slope) / 2)
    return table.table(first_sigma(schedule, options))


def consistency(schedule: Schedule, options: Options) -> StepTable:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): the clean estimate is noised anew.

    Only a run of several steps draws noise; at its end that has no share in the latents.
    """
    table, s = TableBuilder(), schedule.sigmas
    least, unit, several = float(options["sigma_min"]), float(options["sigma_data"]), len(schedule) > 1
    for i in range(schedule.start, len(schedule)):
        clean = consistent(table.latents, table.prediction, s[i], options)
        clean = table.clip(clean, 1.0) if options["clip_denoised"] else clean
        follows = min(max(s[i + 1], least), float(options["sigma_max"]))
        spread = float(options["s_noise"]) * max(follows**2 - least**2, 0.0) ** 0.5
        close_row(table, schedule.timesteps[i], s[i], clean + spread * table.noise, draw=several, unit=unit)
    return table.table(float(options["sigma_max"]))


def lms(schedule: Schedule, options: Options, order: int = 4) -> StepTable:
    """Linear multistep: Adams-Bashforth on uneven sigmas (k-diffusion's sample_lms); slots: the past three slopes.

    A run that starts later (image-to-image) keeps the full order with past slopes of zero, as diffusers does.
    """
    table, s = TableBuilder(history=order - 1), schedule.sigmas
    for i in range(schedule.start, len(schedule)):
        slopes = [slope_at(table, s[i], options), *table.history]
        used = min(i + 1, order)
        h = s[i + 1] - s[i]
        nodes = (s[i - used + 1 : i + 1][::-1] - s[i]) / h
        factors = h * quadrature_factors(nodes, 1 / np.arange(1, used + 1))
        latents = table.latents + sum(factor * slope for factor, slope in zip(factors, slopes, strict=False))
        close_row(table, schedule.timesteps[i], s[i], latents, slopes[: order - 1])
    return table.table(first_sigma(schedule, options))


def consistent(latents: Form, prediction: Form, sigma: float, options: Options) -> Form:
    """Return x0 for latents = x0 + sigma * epsilon and a consistency model (Song et al. 2023, appendix C)."""
    least, unit = float(options["sigma_min"]), float(options["sigma_data"])
    skip = unit**2 / ((sigma - least) ** 2 + unit**2)
    return (sigma - least) * unit / (sigma**2 + unit**2) ** 0.5 * prediction + skip * latents


def kdpm2(schedule: Schedule, options: Options) -> StepTable:
    """Midpoint method in log sigma (k-diffusion's sample_dpm_2, no churn); slot: the step's first latents."""
    return midpoint(schedule, options, ancestral_noise=False)


def kdpm2_ancestral(schedule: Schedule, options: Options) -> StepTable:
    """Midpoint method down to sigma_down, then fresh noise (k-diffusion's sample_dpm_2_ancestral)."""
    return midpoint(schedule, options, ancestral_noise=True)


def midpoint(schedule: Schedule, options: Options, ancestral_noise: bool) -> StepTable:
    """Two rows a step: to the geometric mean of the sigmas, then the whole step with the slope found there."""
    table, s, t = TableBuilder(history=1), schedule.sigmas, schedule.timesteps
    n = len(schedule)
    for i in range(schedule.start, n):
        down, up = ancestral(s[i], s[i + 1]) if ancestral_noise else (s[i + 1], 0.0)
        if i == n - 1:
            close_row(table, t[i], s[i], table.latents - s[i] * slope_at(table, s[i], options))
            break
        middle = (s[i] * down) ** 0.5
        close_row(table, t[i], s[i], table.latents + (middle - s[i]) * slope_at(table, s[i], options), [table.latents])
        latents = table.history[0] + (down - s[i]) * slope_at(table, middle, options) + up * table.noise
        close_row(table, timestep_at(schedule, middle), middle, latents, draw=ancestral_noise, original_sigma=s[i + 1])
    return table.table(first_sigma(schedule, options))


def slope_at(
    table: TableBuilder, sigma: float, options: Options, latents: Form | None = None, hat: float | None = None
) -> Form:
    """Return dx/dsigma = (x - x0) / sigma from the prediction for latents at `sigma`.

    With churn `latents` were noised up to `hat` since the network saw them; only epsilon belongs to the new level.
    """
    latents, hat = table.latents if latents is None else latents, sigma if hat is None else hat
    kind = options["prediction_type"]
    if "sigma_data" in options:
        x0 = preconditioned(kind, latents, table.prediction, hat, options["sigma_data"])
    else:
        level = hat if kind == "epsilon" else sigma
        scale = (level**2 + 1) ** -0.5
        x0, _ = clean_and_noise(kind, scale * latents, table.prediction, scale, level * scale)
    if options.get("clip_sample"):
        x0 = table.clip(x0, options["clip_sample_range"])
    return (latents - x0) / hat


def churned(table: TableBuilder, sigma: float, steps: int, options: Options) -> tuple[float, Form]:
    """Return a raised sigma and the latents with the noise that it takes (Karras et al. 2022, algorithm 2)."""
    churn = options["churn"]
    gamma = min(churn.s_churn / steps, 2**0.5 - 1) if churn.s_tmin <= sigma <= churn.s_tmax else 0.0
    if gamma == 0:
        return sigma, table.latents
    hat = sigma * (gamma + 1)
    return hat, table.latents + churn.s_noise * (hat**2 - sigma**2) ** 0.5 * table.noise


def unit_of(options: Options) -> float:
    """Return the deviation of the data that the network was preconditioned for."""
    return float(options.get("sigma_data", 1.0))


def close_row(
    table: TableBuilder,
    timestep: float,
    sigma: float,
    latents: Form,
    history: Sequence[Form] = (),
    *,
    draw: bool = False,
    original_sigma: float | None = None,
    unit: float = 1.0,
) -> None:
    """Close a row at `sigma`; the network sees unit variance, `unit` being the deviation of clean latents.

    `original_sigma`: the noise level of `original`.
    """
    original = (1.0, sigma if original_sigma is None else original_sigma)
    table.row(timestep, latents, history, original=original, input_scale=(sigma**2 + unit**2) ** -0.5, draw=draw)


def ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Split a step into (sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = sigma_next^2."""
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - up**2) ** 0.5, up


def first_sigma(schedule: Schedule, options: Options) -> float:
    """Return the scale of the first noise: the largest sigma, or with "leading" spacing the deviation at it."""
    if "sigma_data" in options:
        return float((options["sigma_max"] ** 2 + 1) ** 0.5)
    largest = schedule.sigmas.max()
    return float(largest if options["timestep_spacing"] in ("linspace", "trailing") else (largest**2 + 1) ** 0.5)
