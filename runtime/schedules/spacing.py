"""Which of the training timesteps a run visits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError, SchedulerError
from .schedule import Floats, Options

__all__ = ["RESPACED_BY", "clipped_timesteps", "distilled_timesteps", "sigma_choice", "spaced_timesteps"]

RESPACED_BY = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
"""Ways to space sigmas, by the options that ask for them."""


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
    if not 1 <= original <= train:
        raise SchedulerError(
            f"original_inference_steps is {original}: give 1 to num_train_timesteps, which is {train}; "
            "mend the scheduler config"
        )
    if steps > original:
        raise RequestError(f"{steps} steps are more than the model was distilled for: take 1 to {original}")
    timesteps = (np.arange(1, original + 1) * (train // original) - 1)[::-1]
    return timesteps[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)].astype(np.float64)


def clipped_timesteps(options: Options, alphas: Floats) -> int:
    """Count the noisiest training timesteps that `lambda_min_clipped` leaves out (for cosine schedules)."""
    log_snr = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))
    return int(np.searchsorted(log_snr[::-1], options.get("lambda_min_clipped", -np.inf)))


def sigma_choice(options: Options) -> str:
    """Return 'karras', 'exponential', 'beta', 'lu' or ''; raises SchedulerError when the options ask for several."""
    chosen = [name for name, option in RESPACED_BY.items() if options.get(option)]
    if len(chosen) > 1:
        raise SchedulerError(
            f"the scheduler config asks for {' and '.join(chosen)} sigmas at once: "
            f"set only one of {', '.join(RESPACED_BY.values())}"
        )
    return chosen[0] if chosen else ""
