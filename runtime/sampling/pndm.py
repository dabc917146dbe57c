"""PNDM: linear multistep on the DDIM transfer, with or without Runge-Kutta warm-up."""

from __future__ import annotations

import numpy as np

from ...engines.errors import RequestError
from ..schedules import Options, Schedule
from .algebra import Form, clean_and_noise, original_at
from .discrete import final_alpha
from .step_table import StepTable, TableBuilder

__all__ = ["ipndm", "pndm"]

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: Schedule, options: Options) -> StepTable:
    """PNDM (Liu et al. 2022, equations 12 to 14); image-to-image restarts the warm-up in the middle of the schedule."""
    stride = options["num_train_timesteps"] // len(schedule)
    ascending = schedule.timesteps[::-1].astype(int)
    if options["skip_prk_steps"]:
        warm_up = 0
        order = [*ascending[:-1], *ascending[-2:-1], ascending[-1]][::-1]
    else:
        if len(schedule) < 4:
            raise RequestError(
                f"PNDM with Runge-Kutta warm-up needs at least 4 steps, not {len(schedule)}: take more, or use plms"
            )
        pairs = ascending[-4:].repeat(2) + np.tile([0, stride // 2], 4)
        runge_kutta = pairs[:-1].repeat(2)[1:-1][::-1]
        warm_up = len(runge_kutta)
        order = [*runge_kutta, *ascending[:-3][::-1]]
    steps = _Steps(schedule, options, stride)
    for i, t in enumerate(order[schedule.start :]):
        if i < warm_up:
            steps.runge_kutta(i, t, anchor_t=order[i // 4 * 4])
        else:
            steps.linear_multistep(i, t)
    return steps.table.table()


def ipndm(schedule: Schedule, options: Options) -> StepTable:
    """Improved PNDM: Adams-Bashforth from the first step on, of lower order at first (Zhang and Chen 2023, iPNDM).

    The network predicts v of latents signal * x0 + noise * epsilon; slots: three past epsilons.
    """
    signal, noise = np.sqrt(schedule.alphas_cumprod), schedule.sigmas
    table = TableBuilder(history=3)
    for i in range(schedule.start, len(schedule)):
        e = [noise[i] * table.latents + signal[i] * table.prediction, *table.history]
        factors = ADAMS_BASHFORTH[min(i - schedule.start, 3)]
        epsilon = sum(factor * past for factor, past in zip(factors, e, strict=False))
        x0 = (table.latents - noise[i] * epsilon) / max(signal[i], 1e-8)
        latents = signal[i + 1] * x0 + noise[i + 1] * epsilon
        table.row(schedule.timesteps[i], latents, e[:3], original=(float(signal[i]), float(noise[i])))
    return table.table()


class _Steps:
    """The two kinds of PNDM rows; slots: three past predictions, the anchor latents, the running Runge-Kutta mean."""

    def __init__(self, schedule: Schedule, options: Options, stride: int) -> None:
        self.alphas, self.options, self.stride = schedule.alphas_cumprod, options, stride
        self.table = TableBuilder(history=3 if options["skip_prk_steps"] else 5)

    def transfer(self, latents: Form, t: int, t_next: int, prediction: Form) -> Form:
        """Move latents from t to t_next along a prediction (Liu et al. 2022, equation 11)."""
        a = self.alphas[t]
        a_next = self.alphas[t_next] if t_next >= 0 else final_alpha(self.alphas, self.options)
        _, epsilon = clean_and_noise(self.options["prediction_type"], latents, prediction, a**0.5, (1 - a) ** 0.5)
        scale = a * (1 - a_next) ** 0.5 + (a * (1 - a) * a_next) ** 0.5
        return (a_next / a) ** 0.5 * latents - (a_next - a) / scale * epsilon

    def runge_kutta(self, i: int, t: int, anchor_t: int) -> None:
        """Row i of the warm-up: four evaluations a step, weighted 1/6, 1/3, 1/3, 1/6."""
        table = self.table
        *past, anchor, mean = table.history
        stage = i % 4
        used = table.prediction
        if stage == 0:
            past, anchor, mean = [table.prediction, *past[:-1]], table.latents, table.prediction / 6
        elif stage < 3:
            mean = mean + table.prediction / 3
        else:
            used, mean = mean + table.prediction / 6, table.zero
        t_next = t - (0 if i % 2 else self.stride // 2)
        latents = self.transfer(anchor, anchor_t, t_next, used)
        table.row(t, latents, [*past, anchor, mean], original=original_at(self.alphas[t]))

    def linear_multistep(self, i: int, t: int) -> None:
        """Row i of the Adams-Bashforth part; without Runge-Kutta it starts with Heun's method on the first step."""
        table, e = self.table, [self.table.prediction, *self.table.history[:3]]
        start, t_from, t_next = table.latents, t, t - self.stride
        history = e[:3]
        if i == 0:
            used, history = e[0], [e[0], table.zero, table.latents]
        elif i == 1:
            used, history = (e[0] + e[1]) / 2, [e[1]]
            start, t_from, t_next = table.history[2], t + self.stride, t
        elif i == 2:
            used, history = (3 * e[0] - e[1]) / 2, e[:2]
        elif i == 3:
            used = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            used = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        latents = self.transfer(start, t_from, t_next, used)
        table.row(t, latents, history, original=original_at(self.alphas[t]))
