"""The noise that a network was trained with: betas, and the share of signal that they leave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import SchedulerError
from .schedule import Floats, Options

__all__ = ["alphas_cumprod", "linspace", "shifted_alphas", "training_betas", "training_sigmas"]

ZERO_SNR_ALPHA = 2.0**-24  # stands for an alpha of zero, so that sigma stays finite


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


def shifted_alphas(options: Options) -> NDArray[np.float64]:
    """Return alphas with every signal-to-noise ratio divided by `snr_shift_scale` (Yang et al. 2024, CogVideoX).

    diffusers keeps them in float64 for the "scaled_linear" schedule, and removes what signal is left at the end from
    them instead of from the betas.
    """
    scale = float(options["snr_shift_scale"])
    if options["beta_schedule"] == "scaled_linear" and options["trained_betas"] is None:
        ends = np.sqrt(float(options["beta_start"])), np.sqrt(float(options["beta_end"]))
        alphas = np.cumprod(1 - np.linspace(*ends, int(options["num_train_timesteps"])) ** 2)
    else:
        alphas = cumulative_product(1 - training_betas(options)).astype(np.float64)
    alphas = alphas / (scale + (1 - scale) * alphas)
    if options["rescale_betas_zero_snr"]:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.asarray(alphas, np.float64)


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
