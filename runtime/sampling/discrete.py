"""Samplers that step between training timesteps: DDIM, DDPM and latent consistency."""

from __future__ import annotations

import numpy as np

from ...engines.errors import SchedulerError
from .predictions import Form, clean_and_noise
from .schedules import Options, Schedule
from .step_table import StepTable, TableBuilder

__all__ = ["ddim", "ddpm", "final_alpha", "lcm", "original_at"]


def ddim(schedule: Schedule, options: Options) -> StepTable:
    """DDIM (Song et al. 2021, equations 12 and 16)."""
    alphas, eta = schedule.alphas_cumprod, float(options["eta"])
    stride = options["num_train_timesteps"] // len(schedule)
    table = TableBuilder()
    for t in schedule.timesteps[schedule.start :].astype(int):
        a, a_next = alphas[t], alphas[t - stride] if t >= stride else final_alpha(alphas, options)
        x0, epsilon = clean_and_noise(
            options["prediction_type"], table.latents, table.prediction, a**0.5, (1 - a) ** 0.5
        )
        x0 = clipped(table, x0, options)
        variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        latents = a_next**0.5 * x0 + (1 - a_next - variance) ** 0.5 * epsilon + variance**0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=eta > 0)
    return table.table()


def ddpm(schedule: Schedule, options: Options) -> StepTable:
    """DDPM's ancestral sampling (Ho et al. 2020, equations 6 and 7), strided over the given timesteps."""
    alphas = schedule.alphas_cumprod
    timesteps = schedule.timesteps.astype(int)
    table = TableBuilder()
    for t, t_next in list(zip(timesteps, [*timesteps[1:], -1], strict=True))[schedule.start :]:
        a, a_next = alphas[t], alphas[t_next] if t_next >= 0 else 1.0
        beta = 1 - a / a_next
        x0, _ = clean_and_noise(options["prediction_type"], table.latents, table.prediction, a**0.5, (1 - a) ** 0.5)
        x0 = clipped(table, x0, options)
        small = max((1 - a_next) / (1 - a) * beta, 1e-20)
        variance = beta if options["variance_type"] == "fixed_large" else small
        mean = a_next**0.5 * beta / (1 - a) * x0 + (a / a_next) ** 0.5 * (1 - a_next) / (1 - a) * table.latents
        latents = mean + variance**0.5 * table.noise if t > 0 else mean
        table.row(t, latents, original=original_at(a), draw=bool(t > 0))
    return table.table()


def lcm(schedule: Schedule, options: Options) -> StepTable:
    """Multistep latent consistency sampling (Luo et al. 2023, algorithm 3)."""
    alphas = schedule.alphas_cumprod
    timesteps = schedule.timesteps.astype(int)
    table = TableBuilder()
    for i in range(schedule.start, len(timesteps)):
        t, last = timesteps[i], i == len(timesteps) - 1
        a, scaled = alphas[t], t * options["timestep_scaling"]
        x0, _ = clean_and_noise(options["prediction_type"], table.latents, table.prediction, a**0.5, (1 - a) ** 0.5)
        x0 = clipped(table, x0, options)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5  # sigma_data = 0.5
        latents = out * x0 + skip * table.latents
        if not last:
            a_next = alphas[timesteps[i + 1]]
            latents = a_next**0.5 * latents + (1 - a_next) ** 0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=not last)
    return table.table()


def clipped(table: TableBuilder, x0: Form, options: Options) -> Form:
    """Clip the predicted clean latents when the config says `clip_sample`."""
    return table.clip(x0, options["clip_sample_range"]) if options["clip_sample"] else x0


def final_alpha(alphas: np.ndarray, options: Options) -> float:
    """Return the signal power after the last step: 1, or that of the first training timestep."""
    return 1.0 if options["set_alpha_to_one"] else float(alphas[0])


def original_at(a: float) -> tuple[float, float]:
    """Return the signal and noise factors at signal power `a`."""
    if not 0 <= a <= 1:
        raise SchedulerError(f"alphas_cumprod holds {a}: the betas of the scheduler config must lie in [0, 1]")
    return float(a**0.5), float((1 - a) ** 0.5)
