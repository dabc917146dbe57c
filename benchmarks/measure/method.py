"""How contenders are measured: live processes that take turns, request by request.

What disturbs the machine (a neighbour, a clock that drops) then disturbs all of them, and ratios are taken between
requests that stand beside each other. Where memory does not hold all at once, each takes turns with the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ...engines.errors import EngineError
from ..contenders.process import Worker
from .machine import DeviceMeter
from .workloads import Model, Say, Workload

SETTLE_SECONDS, SETTLE_MOST = 0.05, 20
"""Pauses after a turn, until the threads of the contender no longer spin: some do so for a tenth of a second."""
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 3, 50
LAUNCHES = 3
"""Processes over which the rounds of a contender are spread: where memory lands differs from process to process."""
RELAUNCH_SECONDS = 8.0
"""A contender that takes longer to open and warm up stays open for all rounds."""


@dataclass
class Measured:
    """All that was seen of one contender."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    warmup: list[float] = field(default_factory=list)
    """Seconds of the requests before the measured ones."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the device's memory in use at the end of stages, where the contender tells."""
    launches: list[int] = field(default_factory=list)
    """Samples taken in each process, in order."""
    opposite: list[float] = field(default_factory=list)
    """Seconds of the first contender's request in the same round."""
    peak_bytes: int = 0
    device_bytes: int | None = None
    """What the device holds more with this contender open and warm."""
    joules: list[float] = field(default_factory=list)
    answer: Path | None = None
    failure: str | None = None
    turns_with: list[str] = field(default_factory=list)
    together_bytes: int = 0
    """The most memory that this contender and those it took turns with held together."""

    @property
    def seconds(self) -> list[float]:
        """Whole requests, in the order in which they ran."""
        return [sample["total"] for sample in self.samples]


@dataclass
class Conditions:
    """What one measurement is made with: the work, its model, the device, and how much of everything."""

    work: Workload
    model: Model
    device: str
    threads: int
    warmup: int = 2
    rounds: int | None = None
    """None: as many as fit into `budget` seconds for each group of contenders."""
    budget: float = 60.0
    memory_limit: int = 16 * 2**30
    slow: dict[str, float] = field(default_factory=dict)
    bundles: Mapping[str, Path] = field(default_factory=dict)
    """What contenders open, by their names, that do not open the model's bundle."""
    say: Say = lambda line: None
    meter: DeviceMeter | None = None
    folder: Path = Path()
    """For answers that are compared afterwards."""
    after: Callable[[Worker, Measured], None] = lambda worker, measured: None
    """Called for every contender after its last round, while it is still open."""

    def options(self, contender: str = "") -> dict[str, Any]:
        """Return what the worker of a contender needs to prepare."""
        bundle = self.bundles.get(contender, self.model.bundle)
        paths = {"checkpoint": str(self.model.checkpoint), "bundle": str(bundle)}
        return {**self.work.as_request(), **paths, "device": self.device, "max_batch": 4 * self.work.batch}

    def memory_of_one(self) -> int:
        """Estimate what one contender holds: the weights, the libraries, and activations that grow with the pixels."""
        pixels = self.work.height * self.work.width * self.work.batch
        return int(1.1 * self.model.weight_bytes + 2**29 + pixels / 512**2 * 2.5 * 2**30)


def groups(names: Sequence[str], conditions: Conditions) -> list[list[str]]:
    """Split contenders into groups that fit into memory together, the first contender in each of them.

    When not even two fit, each runs alone.
    """
    fit = conditions.memory_limit // max(1, conditions.memory_of_one())
    if fit >= len(names):
        return [list(names)]
    if fit < 2:
        return [[name] for name in names]
    first, rest = names[0], list(names[1:])
    return [[first, *rest[i : i + fit - 1]] for i in range(0, len(rest), fit - 1)]


def turns(names: Sequence[str], conditions: Conditions) -> str:
    """Return in words who took turns with whom."""
    split = groups(names, conditions)
    return "all contenders" if len(split) == 1 else "each with the first" if len(split[0]) > 1 else "none: alone"


def measure(names: Sequence[str], conditions: Conditions) -> dict[str, Measured]:
    """Measure contenders and return what was seen of each; one that fails says so and does not stop the others."""
    found = {name: Measured(name) for name in names}
    for group in groups(names, conditions):
        _measure_group([found[name] for name in group], conditions)
    return found


def _measure_group(group: list[Measured], conditions: Conditions) -> None:
    workers: dict[str, Worker] = {}
    seconds_to_open: dict[str, float] = {}

    def open_worker(measured: Measured) -> None:
        start = time.monotonic()
        worker = workers[measured.name] = Worker(measured.name, conditions.threads)
        _prepare(worker, measured, conditions)
        seconds_to_open[measured.name] = time.monotonic() - start
        worker.settle(SETTLE_SECONDS, SETTLE_MOST)

    try:
        for measured in group:
            conditions.say(f"preparing {measured.name}")
            _guarded(measured, open_worker)
        live = [measured for measured in group if measured.failure is None]
        seconds = sum(measured.warmup[-1] for measured in live) or 1.0
        rounds = conditions.rounds or min(MAXIMUM_ROUNDS, max(MINIMUM_ROUNDS, int(conditions.budget / seconds)))
        conditions.say(f"measuring {rounds} rounds of {', '.join(m.name for m in live)}")
        relaunches = {rounds * part // LAUNCHES for part in range(1, LAUNCHES)} - {0}
        for number in range(rounds):
            if number in relaunches:
                for measured in live:
                    if seconds_to_open[measured.name] < RELAUNCH_SECONDS:
                        workers[measured.name].close()
                        _guarded(measured, open_worker)
            _round(number, group[0], live, workers, conditions)
        together = sum(measured.peak_bytes for measured in live)
        for measured in live:
            measured.turns_with = [m.name for m in live if m is not measured]
            measured.together_bytes = max(measured.together_bytes, together)
            _guarded(measured, lambda m: conditions.after(workers[m.name], m))
    finally:
        for worker in workers.values():
            worker.close()


def _prepare(worker: Worker, measured: Measured, conditions: Conditions) -> None:
    slow = conditions.slow if measured.name.startswith("latentrt/") else {}
    before = conditions.meter.memory_bytes() if conditions.meter else 0
    facts = worker.prepare(**conditions.options(measured.name), slow=slow)
    measured.facts = measured.facts or facts
    warmup = []
    for number in range(max(1, conditions.warmup)):
        answer = conditions.folder / f"{measured.name.replace('/', '-')}.npz"
        reply = worker.run(conditions.work.as_request(), save=answer if number == 0 else None)
        warmup.append(reply["total"])
        measured.answer = answer
        measured.peak_bytes = max(measured.peak_bytes, facts["peak_bytes"], reply["peak_bytes"])
    measured.warmup = measured.warmup or warmup
    measured.launches.append(0)
    if conditions.meter:
        measured.device_bytes = conditions.meter.memory_bytes() - before
    measured.memory = measured.memory or reply.get("memory", {})  # before others open on the same device
    if measured.launches == [0] and facts["options"].get("compile_cache") == "cold":
        measured.facts["build"] = warmup[0] - min(warmup)  # it compiles inside the first request


def _round(
    number: int, first: Measured, live: list[Measured], workers: dict[str, Worker], conditions: Conditions
) -> None:
    """Let every contender answer once; each round another one begins."""
    begin = number % len(live) if live else 0
    for measured in (*live[begin:], *live[:begin]):
        _guarded(measured, lambda m: _turn(workers[m.name], m, conditions))
        workers[measured.name].settle(SETTLE_SECONDS, SETTLE_MOST)
    for measured in live:
        if measured.failure is None and first.failure is None:
            measured.opposite.append(first.seconds[-1])


def _turn(worker: Worker, measured: Measured, conditions: Conditions) -> None:
    before = conditions.meter.energy_joules() if conditions.meter else None
    reply = worker.run(conditions.work.as_request())
    after = conditions.meter.energy_joules() if conditions.meter else None
    measured.samples.append(reply)
    measured.launches[-1] += 1
    measured.peak_bytes = max(measured.peak_bytes, reply["peak_bytes"])
    if before is not None and after is not None:
        measured.joules.append(after - before)


def _guarded(measured: Measured, act: Callable[[Measured], None]) -> None:
    """Do something with a contender that has not failed; when it fails, note why."""
    if measured.failure is not None:
        return
    try:
        act(measured)
    except EngineError as error:
        measured.failure = str(error)


def paired_ratio(measured: Measured) -> float | None:
    """Return the median over rounds of this contender's seconds over the first contender's in the same round."""
    if not measured.opposite:
        return None
    pairs = zip(measured.seconds, measured.opposite, strict=False)  # until one of both failed
    return median(mine / theirs for mine, theirs in pairs)
