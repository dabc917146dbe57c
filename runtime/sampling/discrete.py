"""Samplers that step between training timesteps: DDIM, DDPM, and what grew out of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..schedules import Options, Schedule
from ..schedules.training import training_betas
from .algebra import Form, clean_and_noise, limited, original_at
from .step_table import StepTable, TableBuilder

__all__ = ["ddim", "ddim_inverse", "ddpm", "final_alpha", "lcm", "sde_dpm_video", "tcd", "wuerstchen"]


def ddim(schedule: Schedule, options: Options) -> StepTable:
    """DDIM (Song et al. 2021, equations 12 and 16)."""
    alphas, eta = schedule.alphas_cumprod, float(options["eta"])
    stride = options["num_train_timesteps"] // len(schedule)
    table = TableBuilder()
    for t in schedule.timesteps[schedule.start :].astype(int):
        a, a_next = alphas[t], alphas[t - stride] if t >= stride else final_alpha(alphas, options)
        x0, epsilon = predicted(table, a, options)
        x0 = limited(table, x0, options)
        variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        latents = a_next**0.5 * x0 + (1 - a_next - variance) ** 0.5 * epsilon + variance**0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=eta > 0)
    return table.table()


def ddim_inverse(schedule: Schedule, options: Options) -> StepTable:
    """DDIM backwards, from a picture to its noise (Mokady et al. 2023); the network is told where a step ends."""
    alphas = schedule.alphas_cumprod
    stride = options["num_train_timesteps"] // len(schedule)
    table = TableBuilder()
    for t in schedule.timesteps[schedule.start :].astype(int):
        a, a_next = alphas[t - stride] if t >= stride else final_alpha(alphas, options), alphas[t]
        x0, epsilon = predicted(table, a, options)
        x0 = limited(table, x0, options)
        table.row(t, a_next**0.5 * x0 + (1 - a_next) ** 0.5 * epsilon, original=original_at(a))
    return table.table()


def ddpm(schedule: Schedule, options: Options) -> StepTable:
    """DDPM's ancestral sampling (Ho et al. 2020, equations 6 and 7), strided over the given timesteps.

    A step to the timestep just before takes its beta as trained where `trained_beta` says so (unCLIP).
    """
    alphas, betas = schedule.alphas_cumprod, training_betas(options)
    timesteps = schedule.timesteps.astype(int)
    table = TableBuilder()
    for t, t_next in list(zip(timesteps, [*timesteps[1:], -1], strict=True))[schedule.start :]:
        a, a_next = alphas[t], alphas[t_next] if t_next >= 0 else 1.0
        beta = float(betas[t]) if options.get("trained_beta") and t_next == t - 1 else 1 - a / a_next
        x0 = limited(table, predicted(table, a, options)[0], options)
        small = max((1 - a_next) / (1 - a) * beta, 1e-20)
        latents = a_next**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * table.latents
        if t > 0 and options["variance_type"] == "learned_range":
            latents = latents + table.learned_noise(small, beta)
        elif t > 0:
            latents = latents + (beta if options["variance_type"] == "fixed_large" else small) ** 0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=bool(t > 0))
    return table.table()


def wuerstchen(schedule: Schedule, options: Options) -> StepTable:
    """DDPM's ancestral sampling in continuous time (Pernias et al. 2023); noise is drawn for the last step as well."""
    alphas, times = schedule.alphas_cumprod, schedule.sigmas
    table = TableBuilder()
    for i in range(schedule.start, len(schedule)):
        a, a_next = alphas[i], alphas[i + 1]
        ratio = a / a_next
        latents = (table.latents - (1 - ratio) / (1 - a) ** 0.5 * table.prediction) / ratio**0.5
        if times[i + 1] != 0:
            latents = latents + ((1 - ratio) * (1 - a_next) / (1 - a)) ** 0.5 * table.noise
        table.row(schedule.timesteps[i], latents, original=original_at(a), draw=True)
    return table.table()


def lcm(schedule: Schedule, options: Options) -> StepTable:
    """Multistep latent consistency sampling (Luo et al. 2023, algorithm 3)."""
    alphas = schedule.alphas_cumprod
    timesteps = schedule.timesteps.astype(int)
    table = TableBuilder()
    for i in range(schedule.start, len(timesteps)):
        t, last = timesteps[i], i == len(timesteps) - 1
        a, scaled = alphas[t], t * options["timestep_scaling"]
        x0 = limited(table, predicted(table, a, options)[0], options)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5  # sigma_data = 0.5
        latents = out * x0 + skip * table.latents
        if not last:
            a_next = alphas[timesteps[i + 1]]
            latents = a_next**0.5 * latents + (1 - a_next) ** 0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=not last)
    return table.table()


def tcd(schedule: Schedule, options: Options) -> StepTable:
    """Trajectory consistency sampling (Zheng et al. 2024, algorithm 4): a jump past the next timestep, noised back.

    `eta` is the paper's gamma: 0 jumps to the next timestep and adds nothing, 1 jumps to the picture.
    """
    alphas, eta = schedule.alphas_cumprod, float(options["eta"])
    timesteps = [*schedule.timesteps.astype(int), 0]
    table = TableBuilder()
    for i in range(schedule.start, len(schedule)):
        t, t_next, last = timesteps[i], timesteps[i + 1], i == len(schedule) - 1
        a, a_next = alphas[t], alphas[t_next]
        a_jump = alphas[int(np.float32(1 - eta) * np.float32(t_next))]
        x0, epsilon = predicted(table, a, options)
        latents = a_jump**0.5 * x0 + (1 - a_jump) ** 0.5 * epsilon
        if eta > 0 and not last:
            latents = (a_next / a_jump) ** 0.5 * latents + (1 - a_next / a_jump) ** 0.5 * table.noise
        table.row(t, latents, original=original_at(a), draw=eta > 0 and not last)
    return table.table()


def sde_dpm_video(schedule: Schedule, options: Options) -> StepTable:
    """SDE-DPM-Solver++ 2M between training timesteps (Yang et al. 2024, CogVideoX); slot: the past x0.

    Where a past x0 is used, diffusers draws twice and keeps the second noise.
    """
    alphas = schedule.alphas_cumprod
    stride = options["num_train_timesteps"] // len(schedule)
    half_log_snr = np.log(alphas / (1 - alphas)) / 2
    table = TableBuilder(history=1)
    for i in range(schedule.start, len(schedule)):
        t = int(schedule.timesteps[i])
        a, a_next = alphas[t], alphas[t - stride] if t >= stride else final_alpha(alphas, options)
        h = np.log(a_next / (1 - a_next)) / 2 - half_log_snr[t]
        now = predicted(table, a, options)[0]
        x0, second = now, i > schedule.start and t >= stride
        if second:
            share = h / (2 * (half_log_snr[t] - half_log_snr[int(schedule.timesteps[i - 1])]))
            x0 = (1 + share) * now - share * table.history[0]
        carry = ((1 - a_next) / (1 - a)) ** 0.5 * np.exp(-h)
        spread = ((1 - a_next) * (1 - np.exp(-2 * h))) ** 0.5
        latents = carry * table.latents - np.expm1(-2 * h) * a_next**0.5 * x0 + spread * table.noise
        table.row(t, latents, [now], original=original_at(a), draw=1 + second)
    return table.table()


def predicted(table: TableBuilder, a: float, options: Options) -> tuple[Form, Form]:
    """Return (x0, epsilon) from the prediction for latents of signal power `a`."""
    return clean_and_noise(options["prediction_type"], table.latents, table.prediction, a**0.5, (1 - a) ** 0.5)


def final_alpha(alphas: NDArray[np.float64], options: Options) -> np.float64:
    """Return the signal power after the last step: 1, or that of the first training timestep."""
    return np.float64(1 if options["set_alpha_to_one"] else alphas[0])
