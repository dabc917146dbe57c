"""Curves, mixes, the paced device and load on real batchers over it; no engine runs and no clock is judged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.serving import load, mixes, real, servers, simulate
from latentrt.benchmarks.serving.arrivals import Arrivals, Entry
from latentrt.benchmarks.serving.curve import curve, names, parse
from latentrt.benchmarks.serving.mixes import EVEN, MIXES, Work
from latentrt.benchmarks.serving.paced import Clock, PacedBackend
from latentrt.benchmarks.serving.simulate import POLICIES, Setup
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError, QueueFullError, RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Batcher, Pipeline
from latentrt.runtime.sampling import step_table
from scipy import stats

QUICK = curve("a100-sd15").scaled(0.001)
"""A step of 22 microseconds."""


def test_curves_are_their_sources_numbers() -> None:
    for images, seconds in {1: 1.1, 4: 3.7, 8: 6.9, 16: 13.6}.items():
        assert 50 * curve("a100-sd15").step(2 * images) == pytest.approx(seconds)
    for images, times in {1: 1.0, 2: 1.10, 3: 1.12, 4: 1.44, 8: 2.55, 16: 4.99}.items():
        qwen = curve("h200-qwen512")
        assert qwen.step(2 * images) / qwen.step(2) == pytest.approx(times, abs=0.01)
    for name, operations, utilisation, fixed in (("h200-sd15", 1.607, 0.17, 0.52), ("h200-sdxl", 13.52, 0.29, 0.25)):
        two = operations / (utilisation * 790)
        for rows in (1, 2, 7, 32):
            assert curve(name).step(rows) == pytest.approx(two * (fixed + (1 - fixed) * rows / 2), rel=0.01)


def test_every_curve_says_what_it_is() -> None:
    kinds = {name: curve(name).kind for name in names()}
    assert kinds == {
        "a100-sd15": "published",
        "cpu-embedded": "measured",
        "h200-qwen512": "published",
        "h200-sd15": "model",
        "h200-sdxl": "model",
    }
    beyond = {name: curve(name).extrapolated(16) for name in names()}
    published = "steps of fewer than 2 rows are extrapolated, not published"
    assert beyond == {name: published if kind == "published" else None for name, kind in kinds.items()}
    assert curve("cpu-embedded").extrapolated(32) == "steps of more than 16 rows are extrapolated, not measured"
    assert all("no measurement" in curve(name).source.lower() for name, kind in kinds.items() if kind == "model")


def test_a_curve_is_straight_between_its_points_and_beyond() -> None:
    found = parse("x", json.dumps({"title": "t", "kind": "model", "source": "s", "step_seconds": {"2": 3, "4": 5}}))
    assert [found.step(rows) for rows in (1, 2, 3, 4, 8)] == [2, 3, 4, 5, 9]
    assert found.scaled(0.5).step(3) == 2 and found.scaled(0.5).scaled(2).scale == 1
    assert found.alone(2, 10) == 30


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step_seconds": {"2": 1}}, "curve x: step_seconds: "),
        ({"step_seconds": {"2": 2, "4": 1}}, "must not fall with more rows"),
        ({"step_seconds": {"2": 1, "4": 3}}, "nor reach 0 at one row"),
        ({"step_seconds": {"2": -1, "4": 1}}, r"step_seconds\.2"),
        ({"kind": "guess"}, "curve x: kind: "),
        ({"more": 1}, "curve x: more: "),
    ],
)
def test_what_is_no_curve_is_refused(changed: dict[str, Any], message: str) -> None:
    good = {"title": "t", "kind": "model", "source": "s", "step_seconds": {"2": 3, "4": 5}}
    with pytest.raises(RequestError, match=message):
        parse("x", json.dumps(good | changed))


def test_names_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="curve is 'a101': choose a100-sd15, "):
        curve("a101")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(RequestError, match="curve c is no JSON"):
        curve(str(tmp_path / "c.json"))
    with pytest.raises(RequestError, match="mix is 'no': choose draft, typical, equal"):
        mixes.mix("no")
    (tmp_path / "m.json").write_text('{"steps": {"4": 1}, "guided": 2}')
    with pytest.raises(RequestError, match="guided: "):
        mixes.mix(str(tmp_path / "m.json"))
    for sampler, message in (
        ("eulr", "mix .*m.json: sampler 'eulr' is not known: near are euler"),
        ("heun", "sampler heun evaluates the network 39 times in 20 steps"),
        ("dpm_2_a_karras", "evaluates the network 39 times"),
        ("plms", "evaluates the network 21 times"),
    ):
        (tmp_path / "m.json").write_text(json.dumps({"steps": {"4": 1}, "samplers": {"ddim": 1, sampler: 1}}))
        with pytest.raises(RequestError, match=message):
            mixes.mix(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text('{"steps": {"4": 1}}')
    assert mixes.mix(str(tmp_path / "m.json")).draw(1, 0) == [Work(4, "dpmpp_2m_karras", True)]


def test_mixes_have_the_shares_they_say() -> None:
    works = MIXES["typical"].draw(20_000, 0)
    for steps, share in {4: 0.2, 8: 0.1, 20: 0.3, 25: 0.15, 30: 0.15, 50: 0.1}.items():
        assert sum(work.steps == steps for work in works) / 20_000 == pytest.approx(share, abs=0.01)
    assert all(work.guided == (work.steps > 8) for work in works)
    works = MIXES["draft"].draw(20_000, 0)
    assert sum(work.guided for work in works) / 20_000 == pytest.approx(0.75, abs=0.01)
    assert {work.steps for work in works} == set(range(10, 51)) and {work.sampler for work in works} == set(EVEN)


def test_samplers_of_mixes_evaluate_the_network_once_a_step() -> None:
    config = Bundle.open(ensure_bundle()).manifest.scheduler
    assert {name: len(step_table(config, 20, sampler=name)) for name in EVEN} == dict.fromkeys(EVEN, 20)


def test_gaps_between_arrivals_are_exponential() -> None:
    moments = Arrivals(MIXES["equal"].draw(5000, 0), QUICK, 4.0, queue=1).moments
    assert stats.kstest(np.diff(moments), stats.expon(scale=0.25).cdf).pvalue > 0.01


class VirtualTime:
    """A clock that stands still but for sleeping."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.clock = Clock(lambda: self.seconds, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture(params=[True])
def paced(request: pytest.FixtureRequest) -> Iterator[tuple[Pipeline, VirtualTime]]:
    times = VirtualTime()
    backend = PacedBackend(replace(curve("cpu-embedded"), dynamic=request.param), times.clock)
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe:
        yield pipe, times


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (4.0, 2)])
def test_a_request_takes_what_the_curve_says(paced: tuple[Pipeline, VirtualTime], guidance: float, rows: int) -> None:
    pipe, times = paced
    result = pipe("a star", num_inference_steps=7, guidance_scale=guidance, height=64, width=64)
    found = curve("cpu-embedded")
    assert times.clock.spent == pytest.approx(rows / 2 * found.encode + 7 * found.step(rows) + found.decode)
    assert times.seconds >= times.clock.spent - found.decode  # whoever reads the picture has waited for it
    assert np.asarray(result.images[0]).max() == 0


@pytest.mark.parametrize(("paced", "buckets"), [(True, (1, 2, 3, 4)), (False, (1, 2, 4))], indirect=["paced"])
def test_a_batcher_over_it_takes_steps_of_its_buckets(
    paced: tuple[Pipeline, VirtualTime], buckets: tuple[int, ...]
) -> None:
    pipe, _ = paced
    with Batcher(pipe, slots=2, rows=4) as batcher:
        batcher.warm_up([(64, 64)], pictures=False)
        assert batcher.stats().curve == pytest.approx({rows: curve("cpu-embedded").step(rows) for rows in buckets})
        before = batcher.stats().steps
        futures = [batcher.submit("a star", num_inference_steps=6, seed=seed, height=64, width=64) for seed in range(2)]
        assert all(len(future.result(60).images) == 1 for future in futures)
        steps = batcher.stats().steps
    run = {rows: steps[rows] - before.get(rows, 0) for rows in steps}
    assert sum(rows // 2 * count for rows, count in run.items()) == 12 and not run.get(1) and not run.get(3)
    with pytest.raises(EngineError, match="closed"):
        engine = pipe.backend.open(pipe.bundle, pipe.bundle.graph("decoder"))
        engine.close()
        engine.bind({})


@pytest.fixture(scope="module")
def quick() -> Iterator[Pipeline]:
    with Pipeline(Bundle.open(ensure_bundle()), PacedBackend(QUICK), max_batch=16) as pipe:
        yield pipe


def test_a_measured_curve_says_what_its_engines_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    static = replace(curve("a100-sd15").scaled(0.01), dynamic=False)
    monkeypatch.setattr(real, "open_backend", lambda *_: PacedBackend(static))
    monkeypatch.setattr(real, "ROUNDS", 1)
    monkeypatch.setattr(real, "CALLS", 1)
    monkeypatch.setattr(real._Calls, "step", 1e-3)  # whatever the clock says
    found = real.measure(None, "auto", None, 5, name="mine", size="64x96")
    assert found.title.startswith("the embedded model, 64×96, fp32, paced")
    read = curve(str(real.save(found, tmp_path / "mine.json")))
    assert not found.dynamic and not read.dynamic and curve("a100-sd15").dynamic
    assert tuple(read.known) == Setup(read, slots=2, rows=5).buckets == (1, 2, 4, 5)


SETUP = Setup(QUICK, slots=8, rows=8, queue=32)
SHORT = mixes.Mix(name="short", steps={2: 1, 3: 1}, samplers={"ddim": 1, "euler_a": 1}, guided=0.5)


@pytest.mark.parametrize(("policy", "size"), [*((each, None) for each in POLICIES), *((e, (64, 96)) for e in POLICIES)])
def test_every_policy_answers_all_requests_once(
    quick: Pipeline, policy: simulate.Policy, size: tuple[int, int] | None
) -> None:
    server = servers.open_server(policy, quick, SETUP, size=size)
    try:
        arrivals = Arrivals(SHORT.draw(30, 0), QUICK, math.inf, queue=32)
        outcome = load.run(load.in_process(server, size), arrivals, capacity=1000.0)
        assert outcome.refused() == 0 and len({entry.ended for entry in outcome.entries}) > 1
        result = server.submit(**servers.arguments(Work(2, "ddim", True), 7, size)).result(60)
        assert result.seeds == [7] and len(result.images) == 1 and result.timings.total > 0
        assert result.images[0].size == (size or (128, 128))
    finally:
        server.close()
    with pytest.raises(EngineError, match="closed"):
        server.submit(**servers.arguments(Work(2, "ddim", True), 8))


def test_groups_are_what_their_names_say() -> None:
    def entries(*works: tuple[int, bool]) -> list[Entry]:
        return [Entry(i, Work(steps, "ddim", guided), 1.0) for i, (steps, guided) in enumerate(works)]

    waiting = entries((4, True), (5, True), (4, True), (4, False), (4, True))
    setup = Setup(curve("a100-sd15"), slots=3, rows=4)
    assert [entry.index for entry in simulate.first(waiting, setup)] == [0]
    assert [entry.index for entry in simulate.equals(waiting, setup)] == [0, 2]
    assert [entry.index for entry in simulate.unlikes(waiting, setup)] == [0, 1]
    assert [entry.index for entry in simulate.unlikes(entries((4, False), (5, True), (4, False)), setup)] == [0, 1, 2]


def test_a_group_that_fails_answers_with_its_error(quick: Pipeline) -> None:
    server = servers.open_server("one at a time", quick, SETUP)
    future = server.submit(**{**servers.arguments(Work(2, "ddim", True), 1), "sampler": "no such one"})
    with pytest.raises(RequestError, match="no such one"):
        future.result(60)
    server.close(cancel=True)


class Full:
    """Answers at once, or is full."""

    def __init__(self, places: int) -> None:
        self.places, self.asked = places, list[int]()

    def submit(self, **arguments: Any) -> Future[Any]:
        self.asked.append(arguments["seed"])
        if len(self.asked) > self.places:
            raise QueueFullError("full")
        future: Future[Any] = Future()
        future.set_result(None)
        return future


def test_refusals_are_counted_and_at_saturation_tried_again() -> None:
    works = SHORT.draw(20, 0)
    outcome = load.run(load.in_process(Full(10)), Arrivals(works, QUICK, 1e5, queue=1), capacity=1.0)
    assert [math.isinf(entry.latency) for entry in outcome.entries] == [False] * 10 + [True] * 10
    server = Full(10)

    def make_room(**arguments: Any) -> Future[Any]:
        try:
            return Full.submit(server, **arguments)
        except QueueFullError:
            server.places += 30
            raise

    server_like: Any = type("Server", (), {"submit": staticmethod(make_room)})
    outcome = load.run(load.in_process(server_like), Arrivals(works, QUICK, math.inf, queue=1), capacity=1e4)
    assert outcome.refused() == 0 and server.asked == [*range(11), *range(10, 20)]


def test_requests_over_http_are_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = []

    def post(self: load.OverHttp, path: str, body: str) -> tuple[int, bytes]:
        bodies.append(json.loads(body))
        return 200, b""

    monkeypatch.setattr(load.OverHttp, "post", post)
    for size in (None, (64, 96)):
        with load.OverHttp(1, size) as ask:
            assert ask(Entry(3, Work(4, "ddim", True), 1.0)).result(60)
    assert [body.pop("size", None) for body in bodies] == [None, "64x96"]
    assert bodies[0] == bodies[1] and bodies[0]["num_inference_steps"] == 4


def test_an_answer_that_is_an_error_ends_the_run() -> None:
    def ask(entry: Entry) -> Future[bool]:
        future: Future[bool] = Future()
        future.set_exception(EngineError("broken"))
        return future

    with pytest.raises(EngineError, match="broken"):
        load.run(ask, Arrivals(SHORT.draw(5, 0), QUICK, 1e4, queue=1), capacity=1.0)
