"""Forecasts folded into step tables, against loops that forecast as their authors do, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import RequestError
from latentrt.runtime.loop.forecast import Spectrum, folded, forecast_named
from latentrt.runtime.loop.guidance import guided_in_part, with_skipped_layers
from latentrt.runtime.loop.pack import pack
from latentrt.runtime.sampling import names, step_table
from latentrt.runtime.sampling.step_table import Guided

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (2, 3)
Ask = Callable[[int, Any], Any]


def taylor(evaluations: int, ask: Ask, update: Callable[[int, Any], Any], start: Any) -> tuple[Any, int]:
    """The published loop: value and difference quotient of each evaluation; every third after six, all at the end."""
    value = slope = None
    at, calls, latents = 0, 0, start
    for step in range(evaluations):
        full = step < 6 or step >= evaluations - 2 or (step - 6 >= 2 and (step - 8) % 3 == 0)
        if full:
            new = ask(step, latents)
            slope = None if value is None else (new - value) / (step - at)
            value, at, output, calls = new, step, new, calls + 1
        else:
            output = value + slope * (step - at)
        latents = update(step, output)
    return latents, calls


def spectrum(evaluations: int, ask: Ask, update: Callable[[int, Any], Any], start: Any) -> tuple[Any, int]:
    """The published loop: a buffer of six outputs, Chebyshev polynomials of degree 3, a window that grows."""
    outputs: list[Any] = []
    times: list[float] = []
    window, since, calls, latents = 2.0, 0, 0, start

    def basis(time: float) -> list[float]:
        row = [1.0, time]
        for _ in range(2):
            row.append(2 * time * row[-1] - row[-2])
        return row

    for step in range(evaluations):
        time = step / 50 * 2 - 1
        guess = step >= 4 and step < int(0.9 * evaluations) and len(outputs) > 1
        if guess and (since + 1) % max(1, math.floor(window)) != 0:
            design = np.array([basis(each) for each in times])
            solved = np.linalg.solve(design.T @ design + np.eye(4), np.array(basis(time)))
            fitted = sum(weight * output for weight, output in zip(design @ solved, outputs, strict=True))
            output = 0.6 * (outputs[-1] + 0.5 * (outputs[-1] - outputs[-2])) + 0.4 * fitted
            since += 1
        else:
            output = ask(step, latents)
            outputs, times = [*outputs, output][-6:], [*times, time][-6:]
            window += 0.5 if step >= 4 else 0.0
            since, calls = 0, calls + 1
        latents = update(step, output)
    return latents, calls


LOOPS = {"taylor": taylor, "spectrum": spectrum}


def network(timestep: float, latents: Any) -> Any:
    """A smooth function of both, that is not linear."""
    return np.tanh(latents * (0.3 + timestep / 2000)) + 0.1 * np.sin(timestep / 100)


def deterministic() -> list[str]:
    """Return the samplers whose rows neither draw noise nor clip."""
    found = []
    for name in names():
        table = step_table(CONFIG, 10, sampler=name)
        if not table.draws.any() and not table.clip_limits.any():
            found.append(name)
    return found


def run(table: Any, known: Any = None, mask: Any = None) -> tuple[Any, int]:
    """Return the last latents of a run without forecasts of its own, and how often it asked the network."""
    latents, history = np.random.default_rng(0).standard_normal(SHAPE), [np.zeros(SHAPE)] * table.history
    for i in range(len(table)):
        output = network(float(table.timesteps[i]), latents * table.input_scales[i])
        latents, history = table.apply(i, latents, output, history)
        if known is not None:
            signal, noise = table.original[i + 1]
            latents = np.where(mask, latents, signal * known[0] + noise * known[1])
    return latents, len(table)


@pytest.mark.parametrize("method", LOOPS)
@pytest.mark.parametrize("steps", [10, 17, 30, 50])
def test_a_folded_run_is_the_run_that_forecasts_step_by_step(method: str, steps: int) -> None:
    assert len(deterministic()) > 10
    for sampler in deterministic():
        table = step_table(CONFIG, steps, sampler=sampler)
        history = [np.zeros(SHAPE)] * table.history
        state = {"latents": np.random.default_rng(0).standard_normal(SHAPE), "history": history}

        def ask(i: int, latents: Any, table: Any = table) -> Any:
            return network(float(table.timesteps[i]), latents * table.input_scales[i])

        def update(i: int, output: Any, table: Any = table, state: Any = state) -> Any:
            state["latents"], state["history"] = table.apply(i, state["latents"], output, state["history"])
            return state["latents"]

        expected, calls = LOOPS[method](len(table), ask, update, state["latents"])
        short = folded(table, forecast_named(method))
        found, asked = run(short)
        assert asked == calls and (calls < len(table) or steps == 10), sampler
        assert np.linalg.norm(found - expected) <= 1e-9 * np.linalg.norm(expected), sampler


def test_thirty_steps_take_half_as_many_calls() -> None:
    table = step_table(CONFIG, 30, sampler="ddim")
    assert [len(folded(table, forecast_named(name))) for name in LOOPS] == [15, 14]
    assert [folded(table, forecast_named(name)).history for name in LOOPS] == [1, 5]


def test_what_is_not_repainted_follows_the_picture_and_the_rest_does_not_notice() -> None:
    rng = np.random.default_rng(1)
    known, mask = rng.standard_normal((2, *SHAPE)), np.array([[True, False, True], [False, True, False]])
    table = folded(step_table(CONFIG, 20, sampler="dpmpp_2m"), forecast_named("taylor"))
    free, painted = run(table)[0], run(table, known, mask)[0]
    np.testing.assert_allclose(painted[mask], free[mask], rtol=1e-12)  # this network looks at each cell alone
    np.testing.assert_allclose(painted[~mask], known[0][~mask], rtol=1e-12)  # its noise is gone at the end


def test_options_change_the_plan() -> None:
    table = step_table(CONFIG, 30, sampler="ddim")
    assert (
        len(folded(table, forecast_named("taylor:interval=2")))
        > 16
        > len(folded(table, forecast_named("taylor:interval=5, first=2,last=0")))
    )
    assert len(folded(table, forecast_named("taylor:interval=1"))) == 30
    assert (
        len(folded(table, forecast_named("spectrum:growth=0")))
        > 14
        > len(folded(table, forecast_named("spectrum:growth=3")))
    )
    for given in ("taylor:first=40", "spectrum:until=0", "spectrum:until=0.03"):
        np.testing.assert_array_equal(folded(table, forecast_named(given)).weights, table.weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("newton", "forecast is 'newton': choose taylor or spectrum"),
        ("taylor:order=2", "forecast taylor has no option 'order': it has interval, first, last"),
        ("taylor:interval=0", "forecast taylor has interval=0: give a number from 1 to 1000"),
        ("taylor:interval=two", "forecast taylor has interval=two: give a number from 1"),
        ("spectrum:blend=nan", "forecast spectrum has blend=nan"),
        ("spectrum:until=2", "forecast spectrum has until=2: give a number from 0 to 1"),
        ("spectrum:degree=50", "forecast spectrum has degree=50: give a number from 1 to 6"),
        ("spectrum:ridge=0", "forecast spectrum has ridge=0: give a number from 0.001 to 1000"),
    ],
)
def test_a_forecast_that_there_is_not_is_one_line(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        forecast_named(text)


@pytest.mark.parametrize(("sampler", "why"), [("euler_a", "draws noise at its steps"), ("DDPMScheduler", "draws")])
def test_what_no_row_can_do_for_the_next_is_refused(sampler: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        folded(step_table(CONFIG, 30, sampler=sampler), forecast_named("taylor"))


@pytest.mark.parametrize(("made", "number"), [([550, 575], 600), ([907, 911, 938, 999], 1000)])
def test_a_long_run_is_fitted_as_exact_arithmetic_does(made: list[int], number: int) -> None:
    """Its polynomials are large: in floats, their normal equations say nothing any more."""
    spectrum, count = Spectrum(ridge=1e-3, degree=6), len(made)

    def polynomials(number: int) -> list[Fraction]:
        time = Fraction(number, 25) - 1
        found = [Fraction(1), time]
        while len(found) <= 6:
            found.append(2 * time * found[-1] - found[-2])
        return found

    known, wanted = [polynomials(each) for each in made], polynomials(number)
    rows = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in known] for x in known]
    for i, row in enumerate(rows):
        row[i] += Fraction(1, 1000)
        row.append(sum(a * b for a, b in zip(known[i], wanted, strict=True)))
    for i in range(count):  # Gauss and Jordan
        rows[i] = [each / rows[i][i] for each in rows[i]]
        for j in range(count):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    expected = 0.4 * np.array([float(row[-1]) for row in rows]) + 0.6 * np.array([0] * (count - 2) + [-0.5, 1.5])
    np.testing.assert_allclose(spectrum._factors(made, number)[::-1], expected, rtol=1e-3, atol=1e-3)


def test_factors_that_are_not_finite_are_refused_before_the_run() -> None:
    with pytest.raises(RequestError, match="not finite in a run of 100 evaluations"):
        folded(step_table(CONFIG, 100, sampler="ddim"), Spectrum(blend=math.inf))


def test_clipped_latents_are_refused() -> None:
    clipping = step_table(CONFIG | {"clip_sample": True}, 30, sampler="DDIMScheduler")
    with pytest.raises(RequestError, match="this sampler clips latents"):
        folded(clipping, forecast_named("spectrum"))


@pytest.mark.parametrize(
    ("part", "window"),
    [
        ((0.2, 0.8, 1.0), (0.0, 0.0)),
        ((0.0, 1.0, 0.4), (0.0, 0.0)),
        ((0.2, 0.8, 0.25), (0.0, 0.0)),
        ((0.3, 0.9, 0.35), (0.0, 0.0)),
        ((0.0, 0.7, 0.0), (0.0, 0.0)),
        ((0.0, 1.0, 1.0), (0.01, 0.4)),
        ((0.0, 1.0, 0.4), (0.1, 0.6)),
        ((0.2, 0.8, 0.25), (0.0, 1.0)),
    ],
)
def test_a_run_that_is_guided_in_part_forecasts_as_a_plain_loop_does(
    part: tuple[float, float, float], window: tuple[float, float]
) -> None:
    """Of the rows that are guided fully a forecast may leave out every one: the first that is left is, then."""
    scale, away, (start, stop, reuse) = 5.0, 2.0, (int(share * 30) for share in part)
    table = step_table(CONFIG, 30, sampler="ddim")
    random = np.random.default_rng(0).standard_normal(SHAPE)
    state: dict[str, Any] = {"latents": random, "history": [np.zeros(SHAPE)] * table.history, "added": None}

    def branches(timestep: float, latents: Any) -> tuple[Any, ...]:
        return tuple(network(timestep, latents + offset) for offset in (0.2, 0.5, 0.0))

    def ask(i: int, latents: Any) -> Any:
        without, negative, prompt = branches(float(table.timesteps[i]), latents * table.input_scales[i])
        if not start <= i < stop:
            return prompt
        if i >= reuse and state["added"] is not None:
            return prompt + state["added"]
        state["added"] = (scale - 1) * (prompt - negative)
        skips = 30 * window[0] < i < 30 * window[1]
        return prompt + state["added"] + (away * (prompt - without) if skips else 0.0)

    def update(i: int, output: Any) -> Any:
        state["latents"], state["history"] = table.apply(i, state["latents"], output, state["history"])
        return state["latents"]

    expected, calls = taylor(30, ask, update, random)
    skipping = with_skipped_layers(guided_in_part(table, part), (away, *window), 1)
    assert skipping.skips == (window != (0.0, 0.0))
    short = folded(skipping, forecast_named("taylor"))
    assert len(short) == calls and (Guided.FULLY in short.guided or part == (0.0, 1.0, 1.0))
    weights = pack([short], [(1 - scale, scale)])["weights"][..., 0, 0, 0].astype(float)
    ours, nothing, history = random, np.zeros(SHAPE), [np.zeros(SHAPE)] * short.history
    for i in range(calls):
        each = branches(float(short.timesteps[i]), ours * short.input_scales[i])[0 if short.skips else 1 :]
        ours, *history = np.einsum("lk,kab->lab", weights[i], np.stack([ours, *each, nothing, nothing, *history]))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_part_of_which_no_row_is_left_is_refused() -> None:
    table = step_table(CONFIG, 30, sampler="ddim")
    with pytest.raises(RequestError, match=r"^guidance_interval guides no evaluation that the forecast makes: give a"):
        folded(guided_in_part(table, (0.2, 0.25, 1.0)), forecast_named("taylor"))
    with pytest.raises(RequestError, match=r"^skip_layer_guidance_start and skip_layer_guidance_stop have no"):
        folded(with_skipped_layers(table, (2.0, 0.18, 0.25), 1), forecast_named("taylor"))
    assert folded(guided_in_part(table, (0.2, 0.3, 1.0)), forecast_named("taylor")).guided.count(Guided.FULLY) == 1
