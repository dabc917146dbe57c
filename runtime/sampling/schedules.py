"""Noise schedules: how much signal and noise is left at each step, and the timestep that the network is told.

A schedule of n steps has n timesteps and n + 1 decreasing sigmas (noise over signal; for flow models the share of
noise). Values are rounded to float32 where diffusers rounds them: a timestep cut to a whole number can hang on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError, SchedulerError
from .sigmas import respaced_sigmas, timesteps_from_sigmas

__all__ = [
    "Options",
    "Schedule",
    "alphas_cumprod",
    "discrete_schedule",
    "flow_schedule",
    "k_schedule",
    "solver_schedule",
    "timestep_at",
]

Options = Mapping[str, Any]
Floats = NDArray[np.float32]
ZERO_SNR_ALPHA = 2.0**-24  # stands for an alpha of zero, so that sigma stays finite


@dataclass(frozen=True)
class Schedule:
    """timesteps [n], sigmas [n + 1] (empty for samplers that read `alphas_cumprod` [T]), and the first step to run."""

    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    alphas_cumprod: NDArray[np.float64]
    start: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)


def discrete_schedule(options: Options, steps: int) -> Schedule:
    """Whole timesteps that index `alphas_cumprod` (DDIM, DDPM, PNDM, LCM)."""
    alphas = alphas_cumprod(options)
    if "original_inference_steps" in options:
        timesteps = distilled_timesteps(options, steps)
    else:
        timesteps = spaced_timesteps(options, steps, len(alphas)).round()
    if timesteps.max() >= len(alphas):
        raise RequestError(
            f"{steps} steps with steps_offset={options['steps_offset']} reach beyond the last training timestep: "
            "take fewer steps"
        )
    return Schedule(timesteps, np.empty(0), alphas.astype(np.float64))


def k_schedule(options: Options, steps: int, *, round_karras: bool = False) -> Schedule:
    """Sigmas at fractional timesteps; latents are x0 + sigma * noise (Karras et al. 2022; k-diffusion's samplers)."""
    alphas = alphas_cumprod(options, keep_finite=True)
    training = training_sigmas(alphas)
    logs = np.log(training)
    timesteps = spaced_timesteps(options, steps, len(alphas)).astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if options.get("interpolation_type", "linear") == "log_linear":
        sigmas = np.exp(linspace(float(logs[-1]), float(logs[0]), steps + 1)).astype(np.float64)
    choice = sigma_choice(options)
    if choice:
        sigmas = respaced_sigmas(choice, options, sigmas, steps)
        timesteps = timesteps_from_sigmas(sigmas, logs)
        if choice == "karras" and round_karras:
            timesteps = timesteps.round()
    last = training[0] if options.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
    sigmas = np.append(sigmas, last).astype(np.float32)[: steps + 1].astype(np.float64)
    if options.get("timestep_type") == "continuous" and options["prediction_type"] == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:-1])
    return Schedule(timesteps, sigmas, alphas.astype(np.float64))


def solver_schedule(
    options: Options, steps: int, *, round_karras: bool = True, repeat_last: bool = True, flow_from_one: bool = False
) -> Schedule:
    """Sigmas at whole timesteps for the solvers in log SNR (DPM-Solver, UniPC, DEIS); latents keep unit variance.

    The schedulers differ in small things: whether Karras timesteps of a cosine schedule are rounded, whether
    `sigma_min` as the final sigma repeats the last one of a respaced schedule, and whether flow sigmas run down from 1
    or up from 0.
    """
    alphas = alphas_cumprod(options, keep_finite=True)
    training = training_sigmas(alphas)
    choice, flow = sigma_choice(options), bool(options["use_flow_sigmas"])
    if choice and flow:
        raise SchedulerError(
            f"the scheduler config asks for {choice} and flow sigmas at once: set only one of use_*_sigmas"
        )
    if choice:
        logs = np.log(training)
        sigmas = respaced_sigmas(choice, options, training[::-1], steps)
        timesteps = timesteps_from_sigmas(sigmas, logs)
        if choice == "karras" and (round_karras or options["beta_schedule"] != "squaredcos_cap_v2"):
            timesteps = timesteps.round()
    elif flow:
        sigmas = solver_flow_sigmas(options, steps, flow_from_one)
        timesteps = sigmas * len(alphas)
    else:
        timesteps = spaced_timesteps(options, steps, len(alphas) - clipped_timesteps(options, alphas), extra=1).round()
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    last = 0.0
    if options["final_sigmas_type"] != "zero":
        last = float(sigmas[-1]) if repeat_last and (choice or flow) else float(training[0])
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    return Schedule(np.trunc(timesteps), sigmas, alphas.astype(np.float64))


def solver_flow_sigmas(options: Options, steps: int, from_one: bool) -> NDArray[np.float64]:
    """Return `steps` shifted flow sigmas; a sigma of one, which leaves no signal to divide by, is lowered by 1e-6."""
    train, shift = int(options["num_train_timesteps"]), float(options["flow_shift"])
    ramp = np.linspace(1, 1 / train, steps + 1)
    if not from_one:
        return shifted(1 - ramp, shift)[::-1][:steps]
    sigmas = stretched(shifted(ramp[:-1], shift), options["shift_terminal"])
    sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0
    return sigmas


def flow_schedule(options: Options, steps: int) -> Schedule:
    """Shares of noise from about 1 to 0 for rectified-flow models (Esser et al. 2024), shifted for the image size."""
    train, shift = int(options["num_train_timesteps"]), float(options["shift"])
    dynamic, mu = bool(options["use_dynamic_shifting"]), options["mu"]
    ends = np.array([train, 1], np.float32) / np.float32(train)
    if not dynamic:
        ends = shifted(ends, np.float32(shift))
    sigmas = np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train
    if dynamic:
        if mu is None:
            raise SchedulerError(
                "the scheduler config sets use_dynamic_shifting: pass mu, the shift for this image size"
            )
        sigmas = shifted(sigmas, np.exp(mu) if options["time_shift_type"] == "exponential" else mu)
    else:
        sigmas = shifted(sigmas, shift)
    sigmas = stretched(sigmas, options["shift_terminal"])
    choice = sigma_choice(options)
    if choice:
        sigmas = respaced_sigmas(choice, options, sigmas, steps)
    sigmas = sigmas.astype(np.float32)
    timesteps = (sigmas * np.float32(train)).astype(np.float64)
    return Schedule(timesteps, np.append(sigmas, 0).astype(np.float64), np.empty(0))


def shifted(sigmas: NDArray[Any], shift: Any) -> NDArray[Any]:
    """Move a flow schedule towards the noisy end by the factor `shift` (Esser et al. 2024, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: NDArray[Any], terminal: float | None) -> NDArray[Any]:
    """Stretch a flow schedule so that it ends at `terminal`, where the config gives one."""
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal)) if terminal else sigmas


def timestep_at(schedule: Schedule, sigma: float) -> float:
    """Return the fractional training timestep that belongs to a sigma of `schedule`."""
    logs = np.log(training_sigmas(schedule.alphas_cumprod.astype(np.float32)))
    return float(timesteps_from_sigmas(np.array([sigma]), logs)[0])


def spaced_timesteps(options: Options, steps: int, train: int, extra: int = 0) -> NDArray[np.float64]:
    """Return `steps` decreasing timesteps below `train` (Lin et al. 2023, table 2).

    `extra` = 1 spaces one more point and leaves it out: the solvers end below the last timestep they are told.
    """
    spacing, points = options["timestep_spacing"], steps + extra
    if spacing == "linspace":
        return np.linspace(0, train - 1, points)[::-1][:steps]
    if spacing == "leading":
        return (np.arange(points, dtype=np.float64) * (train // points))[::-1][:steps] + options["steps_offset"]
    if spacing == "trailing":
        full = options["num_train_timesteps"]
        return np.arange(train, 0, -full / steps).round()[:steps] - 1  # arange may yield one value too many
    raise SchedulerError(f"timestep_spacing {spacing!r} is not known: use 'leading', 'trailing' or 'linspace'")


def distilled_timesteps(options: Options, steps: int) -> NDArray[np.float64]:
    """Return `steps` of the timesteps that a latent consistency model was distilled on (Luo et al. 2023)."""
    original, train = int(options["original_inference_steps"]), int(options["num_train_timesteps"])
    if steps > original:
        raise RequestError(f"{steps} steps are more than the model was distilled for: take 1 to {original}")
    timesteps = (np.arange(1, original + 1) * (train // original) - 1)[::-1]
    return timesteps[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].astype(np.float64)


def clipped_timesteps(options: Options, alphas: Floats) -> int:
    """Count the noisiest training timesteps that `lambda_min_clipped` leaves out (for cosine schedules)."""
    log_snr = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))
    return int(np.searchsorted(log_snr[::-1], options.get("lambda_min_clipped", -np.inf)))


def sigma_choice(options: Options) -> str:
    """Return 'karras', 'exponential', 'beta' or ''; raises SchedulerError when the options ask for several."""
    chosen = [name for name in ("karras", "exponential", "beta") if options.get(f"use_{name}_sigmas")]
    if len(chosen) > 1:
        raise SchedulerError(
            f"the scheduler config asks for {' and '.join(chosen)} sigmas at once: set only one of use_*_sigmas"
        )
    return chosen[0] if chosen else ""


def training_sigmas(alphas: Floats) -> Floats:
    """Return noise over signal at every training timestep, in the checkpoint's float32 arithmetic."""
    return np.sqrt((1 - alphas) / alphas)


def alphas_cumprod(options: Options, *, keep_finite: bool = False) -> Floats:
    """Return the share of signal power left at each training timestep, [T] float32.

    `keep_finite` replaces the zero at the end of a zero-terminal-SNR schedule by 2^-24, for samplers that divide by it.
    """
    betas = training_betas(options)
    zero_snr = bool(options.get("rescale_betas_zero_snr"))
    if zero_snr:
        betas = betas_with_zero_snr(betas)
    alphas = cumulative_product(1 - betas)
    if zero_snr and keep_finite:
        alphas[-1] = ZERO_SNR_ALPHA
    return alphas


def training_betas(options: Options) -> Floats:
    """Return the noise added at each training timestep, [T] float32, as `beta_schedule` or `trained_betas` says."""
    if options["trained_betas"] is not None:
        return np.asarray(options["trained_betas"], np.float32)
    train, first, last = int(options["num_train_timesteps"]), float(options["beta_start"]), float(options["beta_end"])
    schedules: dict[str, Callable[[], Floats]] = {
        "linear": lambda: linspace(first, last, train),
        "scaled_linear": lambda: linspace(first**0.5, last**0.5, train) ** 2,
        "sigmoid": lambda: sigmoid(linspace(-6, 6, train)) * np.float32(last - first) + np.float32(first),
        "squaredcos_cap_v2": lambda: betas_from_alpha_bar(cosine_alpha_bar, train),
        "exp": lambda: betas_from_alpha_bar(lambda t: np.exp(t * -12.0), train),
    }
    name = options["beta_schedule"]
    if name not in schedules:
        raise SchedulerError(f"beta_schedule {name!r} is not known: use one of {', '.join(schedules)}")
    return schedules[name]()


def sigmoid(x: Floats) -> Floats:
    """Return the logistic function."""
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def cosine_alpha_bar(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the signal power of the cosine schedule at time t in [0, 1] (Nichol and Dhariwal 2021, equation 17)."""
    return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2


def betas_from_alpha_bar(alpha_bar: Callable[[NDArray[np.float64]], NDArray[np.float64]], train: int) -> Floats:
    """Return betas whose cumulative product follows `alpha_bar`, capped at 0.999."""
    values = alpha_bar(np.arange(train + 1) / train)
    return np.minimum(1 - values[1:] / values[:-1], 0.999).astype(np.float32)


def betas_with_zero_snr(betas: Floats) -> Floats:
    """Rescale betas so that no signal is left at the last timestep (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(cumulative_product(1 - betas))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - np.append(bar[:1], bar[1:] / bar[:-1])


def linspace(first: float, last: float, count: int) -> Floats:
    """Return evenly spaced float32 values, built from both ends with fused multiply-adds as torch does."""
    a, b = np.float64(np.float32(first)), np.float64(np.float32(last))
    step = np.float64(np.float32(b - a) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    return np.where(index < max(count // 2, 1), a + step * index, b - step * (count - 1 - index)).astype(np.float32)


def cumulative_product(values: Floats) -> Floats:
    """Return the running product, accumulated in float64 and rounded to float32."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)
