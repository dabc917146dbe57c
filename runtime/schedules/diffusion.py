"""Schedules of diffusion models, trained at discrete timesteps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError, SchedulerError
from .flow import shift_factor, shifted, shifted_by_mu, stretched
from .schedule import Options, Schedule
from .sigmas import respaced_sigmas, timesteps_from_sigmas
from .spacing import clipped_timesteps, distilled_timesteps, sigma_choice, spaced_timesteps
from .training import alphas_cumprod, linspace, shifted_alphas, training_sigmas

__all__ = [
    "discrete_schedule",
    "inverse_schedule",
    "k_schedule",
    "solver_schedule",
    "timestep_at",
    "whole_range_schedule",
]


def discrete_schedule(options: Options, steps: int) -> Schedule:
    """Whole timesteps that index `alphas_cumprod` (DDIM, DDPM, PNDM, LCM, TCD)."""
    alphas = shifted_alphas(options) if "snr_shift_scale" in options else alphas_cumprod(options)
    if options["timesteps"] is not None:
        timesteps = np.trunc(options["timesteps"])
        if timesteps.max() >= len(alphas):
            raise RequestError(f"timesteps begin with {timesteps[0]:g}: begin at {len(alphas) - 1} or below")
    elif "original_inference_steps" in options:
        timesteps = distilled_timesteps(options, steps)
    else:
        timesteps = spaced_timesteps(options, steps, len(alphas)).round()
    if timesteps.max() >= len(alphas):
        raise RequestError(
            f"{steps} steps with steps_offset={options['steps_offset']} reach beyond the last training timestep: "
            "take fewer steps"
        )
    return Schedule(timesteps, np.empty(0), alphas.astype(np.float64))


def inverse_schedule(options: Options, steps: int) -> Schedule:
    """The timesteps of `discrete_schedule` the other way round: from a picture towards noise."""
    schedule = discrete_schedule(options, steps)
    return replace(schedule, timesteps=schedule.timesteps[::-1])


def whole_range_schedule(options: Options, steps: int) -> Schedule:
    """Whole timesteps from the last one to 0, both among them (unCLIP)."""
    if steps < 2:
        raise RequestError("one step cannot reach from the last training timestep to the first: take 2 or more")
    alphas = alphas_cumprod(options)
    timesteps = (np.arange(steps, dtype=np.float64) * ((len(alphas) - 1) / (steps - 1))).round()[::-1]
    return Schedule(timesteps, np.empty(0), alphas.astype(np.float64))


def k_schedule(options: Options, steps: int, *, round_karras: bool = False) -> Schedule:
    """Sigmas at fractional timesteps; latents are x0 + sigma * noise (Karras et al. 2022; k-diffusion's samplers)."""
    alphas = alphas_cumprod(options, keep_finite=True)
    training = training_sigmas(alphas)
    logs = np.log(training)
    told, given, choice = options["timesteps"], options["sigmas"], sigma_choice(options)
    continuous = options.get("timestep_type") == "continuous" and options["prediction_type"] == "v_prediction"
    if told is not None and (choice or continuous):
        raise not_both(choice or "continuous")
    if given is not None:
        sigmas = given.astype(np.float32).astype(np.float64)
        timesteps = timesteps_from_sigmas(sigmas[:-1], logs)
    else:
        timesteps = spaced_timesteps(options, steps, len(alphas)) if told is None else told
        timesteps = timesteps.astype(np.float32).astype(np.float64)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
        if options.get("interpolation_type", "linear") == "log_linear":
            sigmas = np.exp(linspace(float(logs[-1]), float(logs[0]), steps + 1)).astype(np.float64)
        if choice:
            sigmas = respaced_sigmas(choice, options, sigmas, steps)
            timesteps = timesteps_from_sigmas(sigmas, logs)
            if choice == "karras" and round_karras:
                timesteps = timesteps.round()
        last = training[0] if options.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
        sigmas = np.append(sigmas, last).astype(np.float32)[: steps + 1].astype(np.float64)
    if continuous:
        timesteps = 0.25 * np.log(sigmas[:-1])
    return Schedule(timesteps, sigmas, alphas.astype(np.float64))


def solver_schedule(
    options: Options, steps: int, *, round_karras: bool = True, repeat_last: bool = True, flow_from_one: bool = False
) -> Schedule:
    """Sigmas at whole timesteps for the solvers in log SNR (DPM-Solver, UniPC, DEIS); latents keep unit variance.

    The schedulers differ in small things: whether Karras timesteps of a cosine schedule are rounded, whether
    `sigma_min` as the final sigma repeats the last one of a respaced schedule, and whether flow sigmas run down from 1
    (then Karras sigmas, as noise over signal, may give the shares of noise) or up from 0.
    """
    alphas = alphas_cumprod(options, keep_finite=True)
    training = training_sigmas(alphas)
    choice, flow = sigma_choice(options), bool(options["use_flow_sigmas"])
    if choice and flow and not (choice == "karras" and flow_from_one and options["sigmas"] is None):
        raise SchedulerError(f"{choice} spacing and use_flow_sigmas exclude each other: set only one of them")
    if options["timesteps"] is not None and (choice or flow):
        raise not_both(choice or "flow")
    if options["sigmas"] is not None and not flow:
        raise RequestError("sigmas are taken with use_flow_sigmas only: give timesteps, or choose euler")
    if choice:
        logs = np.log(training)
        sigmas = respaced_sigmas(choice, options, training[::-1], steps)
        if flow:
            sigmas = sigmas / (sigmas + 1)
            timesteps = sigmas * len(alphas)
        else:
            timesteps = timesteps_from_sigmas(sigmas, logs)
            if choice in ("karras", "lu") and (round_karras or options["beta_schedule"] != "squaredcos_cap_v2"):
                timesteps = timesteps.round()
    elif flow:
        sigmas = solver_flow_sigmas(options, steps, flow_from_one)
        timesteps = sigmas * len(alphas)
    else:
        timesteps = spaced_timesteps(options, steps, len(alphas) - clipped_timesteps(options, alphas), extra=1).round()
        if options["timesteps"] is not None:
            timesteps = np.trunc(options["timesteps"])
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    last = 0.0
    if options["final_sigmas_type"] != "zero":
        last = float(sigmas[-1]) if repeat_last and (choice or flow) else float(training[0])
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    return Schedule(np.trunc(timesteps), sigmas, alphas.astype(np.float64))


def not_both(spacing: str) -> RequestError:
    """Return the error for custom timesteps with a schedule that does not follow timesteps."""
    return RequestError(f"timesteps cannot be given with {spacing} sigmas: leave the spacing out, or the timesteps")


def solver_flow_sigmas(options: Options, steps: int, from_one: bool) -> NDArray[np.float64]:
    """Return `steps` shifted flow sigmas; a sigma of one, which leaves no signal to divide by, is lowered by 1e-6."""
    train, shift = int(options["num_train_timesteps"]), float(options["flow_shift"])
    if options["use_dynamic_shifting"] and options["mu"] is not None:
        shift = shift_factor(options)
    ramp = np.linspace(1, 1 / train, steps + 1)
    if not from_one:
        return shifted(1 - ramp, shift)[::-1][:steps]
    if options["use_dynamic_shifting"] and options["mu"] is None:
        raise SchedulerError("the scheduler config sets use_dynamic_shifting: pass mu, the shift for this image size")
    given = ramp[:-1] if options["sigmas"] is None else options["sigmas"]
    moved = shifted_by_mu(given, options) if options["use_dynamic_shifting"] else shifted(given, shift)
    sigmas = stretched(moved, options["shift_terminal"])
    sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0
    return sigmas


def timestep_at(schedule: Schedule, sigma: float) -> float:
    """Return the fractional training timestep that belongs to a sigma of `schedule`."""
    logs = np.log(training_sigmas(schedule.alphas_cumprod.astype(np.float32)))
    return float(timesteps_from_sigmas(np.array([sigma]), logs)[0])
