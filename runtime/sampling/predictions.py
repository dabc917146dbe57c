"""What the network predicts, told apart from how the sampler moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import SchedulerError

__all__ = ["clean_and_noise"]

Form = NDArray[np.float64]


def clean_and_noise(kind: str, latents: Form, prediction: Form, signal: float, noise: float) -> tuple[Form, Form]:
    """Return (x0, epsilon) for latents = signal * x0 + noise * epsilon and a network that predicts `kind`.

    epsilon: the noise. sample: x0. v_prediction: signal * epsilon - noise * x0 (Salimans and Ho 2022, section 4).
    flow_prediction: epsilon - x0, with signal = 1 - noise (Liu et al. 2022).
    """
    if kind == "epsilon":
        return (latents - noise * prediction) / signal, prediction
    if kind == "sample":
        return prediction, (latents - signal * prediction) / noise
    if kind == "v_prediction":
        return signal * latents - noise * prediction, signal * prediction + noise * latents
    if kind == "flow_prediction":
        return latents - noise * prediction, latents + signal * prediction
    raise SchedulerError(f"prediction_type {kind!r} is not known: use epsilon, v_prediction, sample or flow_prediction")
