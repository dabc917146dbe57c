"""A sampler as data: one small matrix per evaluation of the network.

The columns of a row are the basis of the linear step, in this order:

    latents | prediction | noise | clipped | history 1 .. H

`weights[i]` maps the basis to the next latents (its first line) and the next history (the other lines). The clipped
column is itself `clip(clip_weights[i] @ basis, -clip_limits[i], clip_limits[i])`; it serves `clip_sample` and is zero
elsewhere. A table is built by running the sampler's own formulas on the unit vectors of this basis, so a sampler reads
like its paper.

Two columns may be more than that, where the step graph of a bundle has the option (`StepOption`):

    dynamic thresholding   the clipped column is clip(form, -s, s) / s, where s is the quantile `quantiles[i]` of |form|
                           over the image, 1 at least and `clip_limits[i]` at most (Saharia et al. 2022, section 2.3)
    learned variance       the noise column is exp(a + b v) noise, with (a, b) = `spreads[i]` and the v that the network
                           gives for the prompt beside its prediction (Nichol and Dhariwal 2021, equation 15)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...engines.device import Array
from ...engines.errors import SchedulerError

__all__ = ["STEP_INPUTS", "Guided", "StepOption", "StepTable", "TableBuilder", "step_options"]

Form = NDArray[np.float64]  # a linear form over the columns: the coefficients of one quantity
HISTORY = 4  # index of the first history column
LINEAR = -1.0  # in place of a quantile, where the clipped column has a limit of its own

StepOption = Literal["dynamic thresholding", "learned variance"]
"""What a step graph does beside applying a row."""
STEP_INPUTS: Mapping[StepOption, tuple[str, ...]] = {
    "dynamic thresholding": ("quantiles", "largest"),
    "learned variance": ("log_deviations", "log_deviation_slopes"),
}
"""The inputs that a step graph has for each option."""


class Guided(IntEnum):
    """What a row takes for its prediction, where guidance weighs several branches."""

    FULLY = 0
    """All branches by their weights."""
    NOT = 1
    """That of the prompt alone, the last branch: the network need not be asked for the others."""
    AS_BEFORE = 2
    """That of the prompt, and what guidance has added to it in the last row that is guided fully."""


def step_options(inputs: Collection[str]) -> tuple[StepOption, ...]:
    """Return the options of a step graph with inputs of these names."""
    return tuple(option for option, names in STEP_INPUTS.items() if set(names) <= set(inputs))


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows of one denoising run: N evaluations of the network, H history slots, K = 4 + H columns.

    timesteps [N]           what the network is told
    input_scales [N]        the network's input is `input_scales[i] * latents`
    weights [N, 1 + H, K]   basis -> next latents, next history
    clip_weights [N, K]     basis -> the clipped column, before the clip
    clip_limits [N]         its limit; 0 where nothing is clipped
    quantiles [N]           share of an image's values below its own limit, `clip_limits` being the largest; -1: none
    spreads [N, 2]          logarithm of the noise's factor, and its slope over what the network says of it
    draws [N]               how many fresh noise tensors are drawn for this row (in row order); the last one is used
    original [N + 1, 2]     (signal, noise) factors of a given image at the state before row i; last the clean image
    init_noise_sigma        the first latents are `init_noise_sigma * noise`
    guided [N]              `Guided` of each row; empty where all are guided fully
    added                   the history slot for what guidance has added, whose line is written when rows are packed
    skipped [N]             how far guidance moves each row away from what the network predicts for the prompt without
                            some of its layers; empty where it does so nowhere
    """

    timesteps: NDArray[np.float32]
    input_scales: NDArray[np.float64]
    weights: NDArray[np.float64]
    clip_weights: NDArray[np.float64]
    clip_limits: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    spreads: NDArray[np.float64]
    draws: NDArray[np.int64]
    original: NDArray[np.float64]
    init_noise_sigma: float
    guided: tuple[Guided, ...] = ()
    added: int | None = None
    skipped: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Number of history slots."""
        return self.weights.shape[1] - 1

    @property
    def options(self) -> tuple[StepOption, ...]:
        """What the step graph must have."""
        needs = {"dynamic thresholding": (self.quantiles >= 0).any(), "learned variance": self.spreads.any()}
        return tuple(option for option in STEP_INPUTS if needs[option])

    @property
    def skips(self) -> bool:
        """Whether the network is asked for a branch more at some rows, without some of its layers."""
        return any(self.skipped)

    def asked(self, branches: int) -> tuple[int, ...]:
        """Return of how many branches, the last ones, each row takes a prediction; the run's own are so many.

        Empty where every row takes all of them.
        """
        most = branches + self.skips
        found = [branches if each is Guided.FULLY else 1 for each in self.guided] or [branches] * len(self)
        found = [each + bool(scale) for each, scale in zip(found, self.skipped or (0.0,) * len(self), strict=True)]
        return () if {*found} == {most} else tuple(found)

    def apply(
        self, i: int, latents: Array, prediction: Array, history: Sequence[Array], noise: Array | float = 0.0
    ) -> tuple[Array, list[Array]]:
        """Run row i in numpy and return the next latents and history; the step graph does the same on the device.

        The arrays are those of one image, [.., C, h, w]. A prediction of twice its channels has variances in the second
        half, as diffusers' schedulers take them. Raises SchedulerError where the row needs those and there are none.
        """
        variance: Array | float = 0.0
        if np.shape(prediction) != np.shape(latents):
            prediction, variance = np.split(prediction, 2, axis=-3)
        elif self.spreads[i, 1] != 0:
            raise SchedulerError("the row needs learned variances: give a prediction of twice the latents' channels")
        level, slope = self.spreads[i]
        basis = [latents, prediction, np.exp(level + slope * variance) * noise, 0.0, *history]
        form = sum(weight * part for weight, part in zip(self.clip_weights[i], basis, strict=True))
        limit, share = self.clip_limits[i], 1.0
        if self.quantiles[i] >= 0:
            limit = share = min(max(np.quantile(np.abs(form), self.quantiles[i]), 1.0), limit)
        basis[HISTORY - 1] = np.clip(form, -limit, limit) / share
        lines = [sum(weight * part for weight, part in zip(line, basis, strict=True)) for line in self.weights[i]]
        return lines[0], lines[1:]

    def cut(self, rows: int) -> StepTable:
        """Return the first rows, whose latents are those of a run that is not at its end."""
        return replace(self.rows(slice(rows)), original=self.original[: rows + 1])

    def rows(self, which: slice | Sequence[int]) -> StepTable:
        """Return some rows; the states of a given image are left as they are."""
        parts = ("timesteps", "input_scales", "weights", "clip_weights", "clip_limits", "quantiles", "spreads", "draws")
        each = {name: getattr(self, name) for name in ("guided", "skipped")}
        each = {name: tuple(np.array(values, object)[which]) for name, values in each.items() if values}
        return replace(self, **each, **{name: getattr(self, name)[which] for name in parts})

    @property
    def draw_count(self) -> int:
        """Number of noise tensors that the run draws after the initial one."""
        return int(self.draws.sum())


class TableBuilder:
    """Collects rows; `latents`, `prediction`, `noise` and `history` are the unit vectors that formulas run on."""

    _clip: tuple[Form, float]
    _quantile: float
    _spread: tuple[float, float]

    def __init__(self, history: int = 0) -> None:
        self.latents, self.prediction, self.noise, self._clipped, *self.history = np.eye(HISTORY + history)
        self.zero: Form = np.zeros(HISTORY + history)
        self._nothing_more()
        self._rows: list[tuple[NDArray[np.float64], Form, float, float, tuple[float, float]]] = []
        self._timesteps: list[float] = []
        self._input_scales: list[float] = []
        self._draws: list[int] = []
        self._original: list[tuple[float, float]] = []

    def clip(self, form: Form, limit: float) -> Form:
        """Clip a quantity of the current row to [-limit, limit]; at most once a row."""
        self._clip = (form, limit)
        return self._clipped

    def threshold(self, form: Form, quantile: float, largest: float) -> Form:
        """Clip a quantity of the current row to s and divide it by s, in place of `clip`; at most once a row.

        s is a quantile of its absolute values, 1 at least and `largest` at most: where that is no more than 1, s is.
        """
        if largest <= 1:
            return self.clip(form, largest) / largest
        self._quantile = quantile
        return self.clip(form, largest)

    def learned_noise(self, smallest: float, largest: float) -> Form:
        """Return the noise of the current row by its deviation, which the network interpolates; at most once a row.

        Both are variances: the network's -1 stands for the smallest, its 1 for the largest, and the logarithm is linear
        in between.
        """
        low, high = np.log(smallest), np.log(largest)
        self._spread = ((low + high) / 4, (high - low) / 4)
        return self.noise

    def _nothing_more(self) -> None:
        """Forget what the closed row had beside linear columns."""
        self._clip = (self.zero, 0.0)
        self._quantile = LINEAR
        self._spread = (0.0, 0.0)

    def row(
        self,
        timestep: float,
        latents: Form,
        history: Sequence[Form] = (),
        *,
        original: tuple[float, float],
        input_scale: float = 1.0,
        draw: int = 0,
    ) -> None:
        """Close a row with the next latents and the next history (missing slots become zero)."""
        slots = [*history, *[self.zero] * (len(self.history) - len(history))]
        self._rows.append((np.stack([latents, *slots]), *self._clip, self._quantile, self._spread))
        self._timesteps.append(float(timestep))
        self._input_scales.append(float(input_scale))
        self._draws.append(int(draw))
        self._original.append(original)
        self._nothing_more()

    def table(self, init_noise_sigma: float = 1.0) -> StepTable:
        """Return the finished table; raises SchedulerError when the formulas divide by zero for this schedule."""
        parts = (np.array(part, np.float64) for part in zip(*self._rows, strict=True))
        weights, clip_weights, clip_limits, quantiles, spreads = parts
        table = StepTable(
            timesteps=np.array(self._timesteps, np.float32),
            input_scales=np.array(self._input_scales),
            weights=weights,
            clip_weights=clip_weights,
            clip_limits=clip_limits,
            quantiles=quantiles,
            spreads=spreads,
            draws=np.array(self._draws, np.int64),
            original=np.array([*self._original, (1.0, 0.0)], np.float64),
            init_noise_sigma=float(init_noise_sigma),
        )
        if not all(
            np.isfinite(part).all()
            for part in (weights, clip_weights, spreads, table.input_scales, table.timesteps, table.original)
        ):
            raise SchedulerError(
                f"the sampler's formulas divide by zero for {len(table)} rows of this schedule: "
                "choose another number of steps, spacing, final sigma or sampler"
            )
        return table
