"""The linear system behind every multistep method."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["quadrature_factors"]


def quadrature_factors(nodes: ArrayLike, moments: ArrayLike) -> NDArray[np.float64]:
    """Return the factors f_j with sum_j f_j nodes_j^k = moments_k for k = 0, 1, ..; NaN where nodes coincide."""
    right = np.asarray(moments, np.float64)
    powers = np.asarray(nodes, np.float64) ** np.arange(len(right))[:, None]
    try:
        return np.asarray(np.linalg.solve(powers, right), np.float64)
    except np.linalg.LinAlgError:
        return np.full(len(right), np.nan)
