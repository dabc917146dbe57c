"""Schedules in continuous time: the noise level is a formula of the step, and no training timestep is looked up."""

from __future__ import annotations

import numpy as np

from ...engines.errors import RequestError, SchedulerError
from .schedule import Options, Schedule
from .training import linspace

__all__ = ["consistency_schedule", "cosine_schedule", "edm_schedule", "sine_schedule"]


def edm_schedule(options: Options, steps: int, *, single: bool) -> Schedule:
    """Sigmas from sigma_max to sigma_min, even in sigma^(1/rho) or in log sigma (Karras et al. 2022, equation 5).

    `single`: the ramp is float32, and sigma_min follows as the final sigma instead of the last one again.
    """
    smallest, largest, rho = (float(options[name]) for name in ("sigma_min", "sigma_max", "rho"))
    if not (0 < smallest < largest and rho > 0):
        raise SchedulerError(f"sigmas from {largest} to {smallest} with rho={rho} make no schedule: mend the config")
    ramp = linspace(0, 1, steps).astype(np.float64) if single else np.linspace(0, 1, steps)
    if options["sigma_schedule"] == "karras":
        first, last = largest ** (1 / rho), smallest ** (1 / rho)
        sigmas = ((first + ramp * (last - first)) ** rho).astype(np.float32)
    else:
        sigmas = np.exp(linspace(float(np.log(smallest)), float(np.log(largest)), steps))[::-1].astype(np.float32)
    end = 0.0
    if options["final_sigmas_type"] == "sigma_min":
        end = smallest if single else float(sigmas[-1])
    all_sigmas = np.append(sigmas, end).astype(np.float32).astype(np.float64)
    return Schedule(0.25 * np.log(all_sigmas[:-1]), all_sigmas, np.empty(0))


def consistency_schedule(options: Options, steps: int) -> Schedule:
    """Even steps over the training's own Karras sigmas, from sigma_max; sigma_min is the end (Song et al. 2023).

    Timesteps that the request gives are places on the training's scale, 0 being sigma_min.
    """
    smallest, largest, rho = (float(options[name]) for name in ("sigma_min", "sigma_max", "rho"))
    train = int(options["num_train_timesteps"])
    if not (0 < smallest < largest and rho > 0 and train > 1):
        raise SchedulerError(f"sigmas from {largest} to {smallest} with rho={rho} make no schedule: mend the config")
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    places = np.arange(steps) * (train // steps)
    if options["timesteps"] is not None:
        places = options["timesteps"][::-1].astype(int)
        if places[-1] >= train:
            raise RequestError(f"timesteps begin at {places[-1]}: give {train - 1} or less")
    ramp = places / (train - 1)
    sigmas = (first + ramp * (last - first)) ** rho
    rounded = np.append(sigmas, smallest).astype(np.float32).astype(np.float64)
    return Schedule(250 * np.log(sigmas), rounded, np.empty(0))


def cosine_schedule(options: Options, steps: int) -> Schedule:
    """Times from 1 to 0, told as they are; alphas [n + 1] of the cosine schedule (Nichol and Dhariwal 2021).

    Times that the request gives end with the last one.
    """
    given = options["timesteps"]
    times = (linspace(1, 0, steps + 1) if given is None else given.astype(np.float32)).astype(np.float64)
    scaler, s = float(options["scaler"]), float(np.float32(options["s"]))
    bent = 1 - (1 - times) ** scaler if scaler > 1 else times**scaler
    alphas = (np.cos((bent + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)) ** 2
    return Schedule(times[:-1], times, np.clip(alphas, 0.0001, 0.9999))


def sine_schedule(options: Options, steps: int) -> Schedule:
    """Noise sin^2 from 1 to 0 with unit variance, and its angle as the timestep; alphas [n + 1] (crowsonkb's PLMS)."""
    times = linspace(1, 0, steps + 1)
    noise = np.sin(times * np.float32(np.pi) / np.float32(2)) ** 2
    alphas = 1 - noise**2
    timesteps = np.arctan2(noise, np.sqrt(alphas)) / np.float32(np.pi) * np.float32(2)
    return Schedule(timesteps[:-1].astype(np.float64), noise.astype(np.float64), alphas.astype(np.float64))
