"""Forecasts: evaluations of the network that are left out, their predictions taken from earlier ones.

Which evaluations are left out, and by which factors earlier predictions stand in for them, follows from the number of
the evaluation alone. So a forecast is linear, and what an update would do with it is folded into the row before it: a
run of 30 rows becomes one of fewer rows, and nothing but the table is different. It costs fidelity, and needs a run of
many steps.

    taylor     first-order Taylor series in the number of the step (TaylorSeer, Liu et al. 2025; the first order alone
               and its schedule as in OpenVINO GenAI's TaylorSeer-Lite)
    spectrum   ridge regression on Chebyshev polynomials, blended with half a step of the last difference (Spectrum, as
               stable-diffusion.cpp has it)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import RequestError
from ..sampling.step_table import HISTORY, Guided, StepTable

__all__ = ["Forecast", "folded", "forecast_named"]

Factors = tuple[float, ...]
"""What earlier predictions are multiplied by, the latest evaluation's first."""
Plan = list[Factors | None]
"""For every evaluation of a run the factors of its forecast; None where the network is asked."""


class Forecast(Protocol):
    """A rule for what is left out."""

    def plan(self, evaluations: int) -> Plan:
        """Return what becomes of each evaluation of a run."""


@dataclass(frozen=True)
class Taylor:
    """A straight line through the last two predictions.

    interval   evaluations from one to the next, between the first and the last ones
    first      evaluations at the start that are all made
    last       evaluations at the end that are all made
    """

    interval: int = 3
    first: int = 6
    last: int = 2

    def plan(self, evaluations: int) -> Plan:
        """Return what becomes of each evaluation; at least two are made before the first forecast."""
        start, end = max(self.first, 2), evaluations - self.last
        plan: Plan = []
        made: list[int] = []
        for number in range(evaluations):
            if number < start or number >= end or (number - start + 1) % self.interval == 0:
                plan.append(None)
                made.append(number)
            else:
                latest, before = made[-1], made[-2]
                slope = (number - latest) / (latest - before)
                plan.append((1 + slope, -slope))
        return plan


@dataclass(frozen=True)
class Spectrum:
    """Chebyshev polynomials through the last predictions, in a window that grows.

    blend      share of the polynomials; the rest is half a step along the last difference
    degree     of the polynomials
    ridge      of their regression
    window     evaluations from one to the next at first
    growth     of the window, with each evaluation
    first      evaluations at the start that are all made
    until      share of the run after which all are made
    """

    blend: float = 0.4
    degree: int = 3
    ridge: float = 1.0
    window: int = 2
    growth: float = 0.5
    first: int = 4
    until: float = 0.9

    def plan(self, evaluations: int) -> Plan:
        """Return what becomes of each evaluation."""
        stop, kept = int(self.until * evaluations), max(self.degree + 1, 6)
        plan: Plan = []
        made: list[int] = []
        window, left_out = float(self.window), 0
        for number in range(evaluations):
            ends = number < self.first or number >= stop or len(made) < 2
            if ends or (left_out + 1) % max(1, math.floor(window)) == 0:
                plan.append(None)
                made.append(number)
                window += self.growth if number >= self.first else 0
                left_out = 0
            else:
                plan.append(self._factors(made[-kept:], number))
                left_out += 1
        return plan

    def _factors(self, made: Sequence[int], number: int) -> Factors:
        known, wanted = (self._polynomials(np.asarray(each, np.float64)) for each in (made, [number]))
        left, singular, right = np.linalg.svd(known, full_matrices=False)  # long runs have large polynomials
        factors = self.blend * (left @ (singular / (singular**2 + self.ridge) * (right @ wanted[0])))
        factors[-1] += (1 - self.blend) * 1.5
        factors[-2] -= (1 - self.blend) * 0.5
        return tuple(float(factor) for factor in factors[::-1])

    def _polynomials(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return T_0 .. T_degree of each number, 0 to 50 taken as -1 to 1."""
        return np.asarray(np.polynomial.chebyshev.chebvander(numbers / 25 - 1, self.degree))


METHODS: Mapping[str, Callable[..., Forecast]] = {"taylor": Taylor, "spectrum": Spectrum}
BOUNDS: Mapping[str, tuple[float, float]] = {
    "blend": (0, 1),
    "until": (0, 1),
    "degree": (1, 6),
    "ridge": (1e-3, 1000),  # without one, fewer predictions than polynomials leave their factors open
    "interval": (1, 1000),
}
"""Smallest and largest number of options, where they are not those of `ANY`."""
ANY = (0, 1000)


def forecast_named(text: str) -> Forecast:
    """Return a forecast from `taylor`, or with options `taylor:interval=4,first=8`; raises `RequestError`."""
    name, _, given = text.partition(":")
    if name not in METHODS:
        raise RequestError(f"forecast is {text!r}: choose {' or '.join(METHODS)}, or leave it out")
    method: Any = METHODS[name]
    kinds: dict[str, Any] = {each.name: type(each.default) for each in fields(method)}
    options: dict[str, float] = {}
    for part in filter(None, given.split(",")):
        option, _, value = (piece.strip() for piece in part.partition("="))
        if option not in kinds:
            raise RequestError(f"forecast {name} has no option {option!r}: it has {', '.join(kinds)}")
        try:
            options[option] = kinds[option](value)
        except ValueError:
            options[option] = math.nan
        least, most = BOUNDS.get(option, ANY)
        if not least <= options[option] <= most:
            raise RequestError(f"forecast {name} has {option}={value}: give a number from {least} to {most}")
    forecast: Forecast = method(**options)
    return forecast


def folded(table: StepTable, forecast: Forecast) -> StepTable:
    """Return the run with fewer evaluations; the latents between two of them are those after the last one's row.

    Raises `RequestError` for a table whose rows draw noise or clip, which no row before them can do, and where no
    row is left of those that are guided, or skip layers.
    """
    with np.errstate(all="ignore"):  # what is not finite is refused below
        plan = forecast.plan(len(table))
    if not all(math.isfinite(factor) for factors in plan for factor in factors or ()):
        raise RequestError(f"the forecast's factors are not finite in a run of {len(table)} evaluations: give others")
    left_out = np.array([factors is not None for factors in plan])
    for what, values in (("draws noise at its steps", table.draws), ("clips latents", table.clip_limits)):
        if (values[left_out] > 0).any():
            raise RequestError(f"a forecast needs steps that are linear in earlier ones, and this sampler {what}")
    remembered = max((len(factors) for factors in plan if factors is not None), default=1) - 1
    history = table.history
    columns = HISTORY + history + remembered
    unit = np.eye(columns)
    weights = []
    starts = [number for number, factors in enumerate(plan) if factors is None]
    for start, end in zip(starts, [*starts[1:], len(plan)], strict=True):
        latents, outputs = unit[0], [unit[1], *unit[HISTORY + history :]]
        kept = list(unit[HISTORY : HISTORY + history])
        for number in range(start, end):
            factors = plan[number] or (1.0,)
            prediction = sum(factor * output for factor, output in zip(factors, outputs, strict=False))
            first = number == start
            basis = [latents, prediction, unit[2] * first, unit[3] * first, *kept]
            latents, *kept = (table.weights[number] @ np.stack(basis)).reshape(1 + history, columns)
        weights.append(np.stack([latents, *kept, *outputs[:remembered]]))
    clip = np.pad(table.clip_weights, ((0, 0), (0, remembered)))
    return replace(
        _guided(table, starts),
        weights=np.stack(weights),
        clip_weights=clip[starts],
        original=table.original[[*starts, len(table)]],
    )


def _guided(table: StepTable, starts: Sequence[int]) -> StepTable:
    """Return the rows that are left, the first of them that is guided asking for what the others reuse.

    It skips layers where the last one before it that would have been asked does.
    """
    left = table.rows(starts)
    guided, skipped = list(left.guided), list(left.skipped)
    first = next((row for row, each in enumerate(guided) if each is not Guided.NOT), None)
    if first is None and {*table.guided} - {Guided.NOT}:
        raise RequestError(
            "guidance_interval guides no evaluation that the forecast makes: give a wider one, or another forecast"
        )
    if first is not None and guided[first] is Guided.AS_BEFORE:
        fully = [row for row in range(starts[first]) if table.guided[row] is Guided.FULLY]
        guided[first] = Guided.FULLY
        if skipped:
            skipped[first] = table.skipped[fully[-1]]
    if table.skips and not any(skipped):
        raise RequestError(
            "skip_layer_guidance_start and skip_layer_guidance_stop have no evaluation between them that the forecast "
            "makes: give a wider part, or another forecast"
        )
    return replace(left, guided=tuple(guided), skipped=tuple(skipped))
