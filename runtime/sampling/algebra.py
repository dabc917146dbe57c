"""What the methods share: what the network predicts, and the linear system behind every multistep method."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...engines.errors import SchedulerError
from ..schedules import Options
from .step_table import TableBuilder

__all__ = ["Form", "clean_and_noise", "limited", "original_at", "preconditioned", "quadrature_factors"]

Form = NDArray[np.float64]
"""A linear form over the columns of a step table."""


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


def limited(table: TableBuilder, x0: Form, options: Options) -> Form:
    """Return the predicted clean latents as `thresholding` or `clip_sample` limits them; thresholding goes first."""
    if options.get("thresholding"):
        return table.threshold(x0, float(options["dynamic_thresholding_ratio"]), float(options["sample_max_value"]))
    return table.clip(x0, options["clip_sample_range"]) if options.get("clip_sample") else x0


def preconditioned(kind: str, latents: Form, prediction: Form, sigma: float, sigma_data: float) -> Form:
    """Return x0 for latents = x0 + sigma * epsilon and a preconditioned network (Karras et al. 2022, equation 7).

    A network of "v_prediction" gives the prediction of "epsilon" with the other sign.
    """
    total = sigma**2 + sigma_data**2
    out = sigma * sigma_data / total**0.5
    return sigma_data**2 / total * latents + (out if kind == "epsilon" else -out) * prediction


def original_at(a: float) -> tuple[float, float]:
    """Return the signal and noise factors at signal power `a`."""
    if not 0 <= a <= 1:
        raise SchedulerError(f"alphas_cumprod holds {a}: the betas of the scheduler config must lie in [0, 1]")
    return float(a**0.5), float((1 - a) ** 0.5)


def quadrature_factors(nodes: ArrayLike, moments: ArrayLike) -> NDArray[np.float64]:
    """Return the factors f_j with sum_j f_j nodes_j^k = moments_k for k = 0, 1, ..; NaN where nodes coincide."""
    right = np.asarray(moments, np.float64)
    powers = np.asarray(nodes, np.float64) ** np.arange(len(right))[:, None]
    try:
        return np.asarray(np.linalg.solve(powers, right), np.float64)
    except np.linalg.LinAlgError:
        return np.full(len(right), np.nan)
