"""Schedules of rectified-flow models, in shares of noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError, SchedulerError
from .schedule import Options, Schedule
from .sigmas import respaced_sigmas
from .spacing import sigma_choice

__all__ = [
    "flow_map_schedule",
    "flow_schedule",
    "shift_factor",
    "shifted",
    "shifted_by_mu",
    "stretched",
    "trigonometric_schedule",
]


def flow_schedule(options: Options, steps: int) -> Schedule:
    """Shares of noise from about 1 to 0 for rectified-flow models (Esser et al. 2024), shifted for the image size.

    Sigmas that the request gives are shifted as well; timesteps that it gives are told to the network as they are.
    """
    train, shift = int(options["num_train_timesteps"]), float(options["shift"])
    dynamic, mu = bool(options.get("use_dynamic_shifting")), options["mu"]
    if dynamic and mu is None:
        raise SchedulerError("the scheduler config sets use_dynamic_shifting: pass mu, the shift for this image size")
    told, given = options["timesteps"], options["sigmas"]
    if given is not None:
        sigmas = given.astype(np.float32)
    elif told is not None:
        sigmas = told.astype(np.float32) / np.float32(train)
    else:
        ends = np.array([train, 1], np.float32) / np.float32(train)
        if not dynamic:
            ends = shifted(ends, np.float32(shift))
        sigmas = np.linspace(float(ends[0]) * train, float(ends[1]) * train, steps) / train
    sigmas = shifted_by_mu(sigmas, options) if dynamic else shifted(sigmas, shift)
    sigmas = stretched(sigmas, options.get("shift_terminal"))
    choice = sigma_choice(options)
    if choice:
        sigmas = respaced_sigmas(choice, options, sigmas, steps)
    sigmas, last = sigmas.astype(np.float32), 0
    timesteps = sigmas * np.float32(train) if told is None else told.astype(np.float32)
    if options.get("invert_sigmas"):  # shares of signal, which rise to 1
        sigmas, last = 1 - sigmas, 1
        timesteps = sigmas * np.float32(train)
    return Schedule(timesteps.astype(np.float64), np.append(sigmas, last).astype(np.float64), np.empty(0))


def flow_map_schedule(options: Options, steps: int) -> Schedule:
    """Even shares of noise from 1 to 0, shifted, in float64, as are those that the request gives (Gu et al. 2026)."""
    train = int(options["num_train_timesteps"])
    told, given = options["timesteps"], options["sigmas"]
    shares = np.linspace(1, 0, steps + 1)[:-1]
    if given is not None:
        shares = np.asarray(given, np.float64)
    elif told is not None:
        shares = np.asarray(told, np.float64) / train
    shares = shifted(shares, float(options["shift"]))
    return Schedule(shares * train, np.append(shares, 0.0), np.empty(0))


def trigonometric_schedule(options: Options, steps: int) -> Schedule:
    """Angles from pi / 2 to 0: latents are cos(t) x0 + sin(t) epsilon (Lu and Song 2024, TrigFlow).

    Two steps meet at 1.3, as the authors of SANA-Sprint do. Timesteps that the request gives end with the last angle.
    """
    angles = np.linspace(1.5708, 0, steps + 1) if steps != 2 else np.array([1.5708, 1.3, 0])
    if options["timesteps"] is not None:
        angles = options["timesteps"]
    angles = angles.astype(np.float32).astype(np.float64)
    return Schedule(angles[:-1], angles, np.empty(0))


def shift_factor(options: Options) -> float:
    """Return the factor that stands for the shift mu: its exponential, or mu itself."""
    return float(np.exp(options["mu"]) if options["time_shift_type"] == "exponential" else options["mu"])


def shifted_by_mu(sigmas: NDArray[Any], options: Options) -> NDArray[Any]:
    """Move a flow schedule by the shift mu; the form is diffusers', so that rounding is."""
    factor = shift_factor(options)
    return factor / (factor + (1 / sigmas - 1))


def shifted(sigmas: NDArray[Any], shift: Any) -> NDArray[Any]:
    """Move a flow schedule towards the noisy end by the factor `shift` (Esser et al. 2024, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: NDArray[Any], terminal: float | None) -> NDArray[Any]:
    """Stretch a flow schedule so that it ends at `terminal`, where the config gives one."""
    if not terminal:
        return sigmas
    if sigmas[-1] == 1:
        raise RequestError(
            f"shift_terminal={terminal!r} cannot move the end of a run that is all noise: take more steps"
        )
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))
