"""Ways to share one pipeline, all with a batcher's `submit`: in flight, one at a time, and two kinds of static batches.

The baselines run on the same engines and with the same bound on what waits. One at a time and static batches of equals
are calls of the pipeline; static batches of unlike requests are groups in a batcher that nobody joins until the last
image of the group is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ...engines.errors import EngineError, QueueFullError
from ...runtime import Batcher, GenerationResult, Pipeline
from ...runtime.batcher.stats import Observer, Stats, Tally
from .mixes import Work
from .simulate import GROUPS, Group, Policy, Setup

PROMPT = "a red circle on a blue background"
GUIDANCE = 4.0
PLAIN = ("prompt", "num_inference_steps", "sampler", "guidance_scale", "seed", "width", "height")
"""The arguments that requests of a mix have."""


def arguments(work: Work, seed: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a request as arguments of a pipeline's call; the prompt is told apart by the seed.

    `size` is width and height in pixels; None: the bundle's own.
    """
    sides = {} if size is None else {"width": size[0], "height": size[1]}
    return {
        **sides,
        "prompt": f"{PROMPT}, {seed % 100}",
        "num_inference_steps": work.steps,
        "sampler": work.sampler,
        "guidance_scale": GUIDANCE if work.guided else 1.0,
        "seed": seed,
    }


@dataclass(eq=False)
class Asked:
    """A request that waits for its group."""

    arguments: dict[str, Any]
    work: Work
    arrived: float
    timeout: float | None
    future: Future[GenerationResult[Any]] = field(default_factory=Future)

    def answer(self, images: Any, result: GenerationResult[Any]) -> None:
        """Give the future its part of a result."""
        timings = replace(result.timings, total=time.monotonic() - self.arrived)
        self.future.set_result(replace(result, images=images, seeds=[self.arguments["seed"]], timings=timings))


class Grouped:
    """Requests in groups: the next one is chosen when the last image of the one before is done."""

    stuck_seconds = 0.0
    failures_in_a_row = 0

    def __init__(self, pipe: Pipeline, setup: Setup, group: Group, run: Callable[[list[Asked]], None] | None) -> None:
        """Start; `run` draws a group and answers it, without it the pipeline's own call does."""
        self.pipe = pipe
        self._setup, self._group, self._draw = setup, group, run or self._call
        self._waiting: list[Asked] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="latentrt grouped", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        previews: int = 0,
        on_event: object = None,
        **given: Any,
    ) -> Future[GenerationResult[Any]]:
        """Queue a request of one image, of the size that all have, and return the future of its result.

        Raises `QueueFullError` when too much waits.
        """
        chosen = {name: value for name, value in given.items() if name in PLAIN}
        work = Work(chosen["num_inference_steps"], chosen["sampler"], chosen["guidance_scale"] > 1)
        asked = Asked({"prompt": prompt, **chosen}, work, time.monotonic(), timeout)
        with self._changed:
            if self._closing:
                raise EngineError("the server is closed: open another one")
            if len(self._waiting) >= self._setup.queue:
                raise QueueFullError(f"{len(self._waiting)} images wait: at most {self._setup.queue} may; try later")
            self._waiting.append(asked)
            self._changed.notify()
        return asked.future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                chosen = self._group(self._waiting, self._setup)
                self._waiting = [asked for asked in self._waiting if asked not in chosen]
            chosen = [asked for asked in chosen if asked.future.set_running_or_notify_cancel()]
            try:
                if chosen:
                    self._draw(chosen)
            except Exception as error:
                for asked in chosen:
                    if not asked.future.done():
                        asked.future.set_exception(error)

    def _call(self, group: list[Asked]) -> None:
        """Draw equal requests by one call of the pipeline."""
        shared = {name: value for name, value in group[0].arguments.items() if name not in ("prompt", "seed")}
        prompts, seeds = ([asked.arguments[name] for asked in group] for name in ("prompt", "seed"))
        result = self.pipe(prompts, seed=seeds, **shared)
        for index, asked in enumerate(group):
            asked.answer([result.images[index]], result)

    def stats(self) -> Stats:
        """Return what waits; nothing else is counted."""
        with self._changed:
            waiting, setup = len(self._waiting), self._setup
        return Stats(
            waiting=waiting,
            running=0,
            oldest_waiting_seconds=0.0,
            slots=setup.slots,
            rows=setup.rows,
            work_seconds=0.0,
            curve={},
            sizes=(),
            **Tally().snapshot(),
        )

    def close(self, *, cancel: bool = False) -> None:
        """Draw what waits, or drop it; calling it again does nothing."""
        with self._changed:
            self._closing = True
            dropped, self._waiting = (self._waiting, []) if cancel else ([], self._waiting)
            self._changed.notify()
        for asked in dropped:
            asked.future.cancel()
        self._thread.join()


class Crowd(Grouped):
    """Static batches of unlike requests: a batcher draws a group, and gets the next one when it is empty."""

    def __init__(self, pipe: Pipeline, setup: Setup, group: Group, size: tuple[int, int] | None) -> None:
        """Open the batcher, warmed up."""
        self.batcher = Batcher(pipe, slots=min(setup.slots, setup.knee), rows=setup.knee, max_waiting=setup.slots)
        self.batcher.warm_up(None if size is None else [size], pictures=False)
        super().__init__(pipe, setup, group, self._together)

    def _together(self, group: list[Asked]) -> None:
        futures = [self.batcher.submit(**asked.arguments) for asked in group]
        done = [threading.Event() for _ in group]
        for asked, future, event in zip(group, futures, done, strict=True):
            future.add_done_callback(lambda each, asked=asked, event=event: _pass_on(each, asked, event))  # type: ignore[misc]
        for event in done:
            event.wait()

    def close(self, *, cancel: bool = False) -> None:
        """Draw what waits, or drop it; calling it again does nothing."""
        super().close(cancel=cancel)
        self.batcher.close()


def _pass_on(future: Future[GenerationResult[Any]], asked: Asked, event: threading.Event) -> None:
    try:
        if (error := future.exception()) is not None:
            asked.future.set_exception(error)
        else:
            asked.answer(future.result().images, future.result())
    finally:
        event.set()


def open_server(
    policy: Policy,
    pipe: Pipeline,
    setup: Setup,
    observer: Observer | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Batcher | Grouped:
    """Return a policy over a pipeline, which stays the caller's; warmed up. A batcher tells `observer` of its steps.

    `size` is width and height of all requests; None: the bundle's own.
    """
    if policy == "in-flight":
        batcher = Batcher(pipe, slots=setup.slots, rows=setup.rows, max_waiting=setup.queue, observer=observer)
        batcher.warm_up(None if size is None else [size], pictures=False)
        return batcher
    if policy == "static unlike":
        return Crowd(pipe, setup, GROUPS[policy], size)
    server = Grouped(pipe, setup, GROUPS[policy], None)
    for guided in (False, True):  # what a first request of each width would wait for
        for images in range(1, 1 + (setup.slots if policy == "static equal" else 1)):
            work = arguments(Work(2, "euler_a", guided), 0, size)
            if images * (1 + guided) <= setup.rows:
                pipe([PROMPT] * images, **{name: value for name, value in work.items() if name != "prompt"})
    return server
