"""A request on its way: state, progress, pictures, and those who listen to it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..result import GenerationResult
from .errors import outcome_of
from .pictures import Picture
from .work import Size, Work

State = Literal["loading", "queued", "running", "succeeded", "failed", "cancelled"]
OVER: tuple[State, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Queued:
    """The request was taken: its fields are served as they are."""


@dataclass(frozen=True)
class Stepped:
    """`done` of an image's `total` evaluations are behind it."""

    index: int
    done: int
    total: int


@dataclass(frozen=True)
class Previewed:
    """An image on its way, the `number`-th preview of it."""

    index: int
    number: int
    picture: Picture


@dataclass(frozen=True)
class Pictured:
    """An image is there."""

    index: int
    picture: Picture


@dataclass(frozen=True)
class Ended:
    """The request is over: it succeeded, failed with an error, or was cancelled."""

    state: State
    error: BaseException | None = None


@dataclass(frozen=True)
class Moment:
    """How far a job is at one moment: its state, and what is known with that."""

    state: State
    error: BaseException | None
    finished: float | None
    facts: Mapping[str, Any]


Event = Queued | Stepped | Previewed | Pictured | Ended
Hear = Callable[[Event], None]


class Job:
    """A request from its arrival to its result; for any number of threads.

    Listeners are called one event at a time, on the thread on which it happens: they must return at once.
    """

    def __init__(self, work: Work, name: str, size: Size, timeout: float, *, steps: bool = True) -> None:
        """A request for pictures of a size from the bundle `name`, which nobody wants after `timeout` seconds.

        `steps`: somebody may want to hear of them.
        """
        self.id = f"job-{secrets.token_hex(12)}"
        self.work, self.model, self.size, self.timeout, self.steps = work, name, size, timeout, steps
        self.created, self.arrived = time.time(), time.monotonic()
        self.finished: float | None = None
        """When it was over (`time.time`), or None."""
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.pictures: dict[int, Picture] = {}
        self.facts: dict[str, Any] = {}
        """What is said with the result: timings, warnings, the digest of the bundle, every parameter."""
        self.ignored: list[str] = []
        """Fields that its client gave and that mean nothing here."""
        self.fetched = False
        """Whether its client has been told how it ended, and has every picture."""
        self.given = set[int]()
        """Pictures that its client has fetched alone."""
        self.asked = self.arrived
        """When somebody last asked for it, or heard of it (`time.monotonic`)."""
        self._steps: dict[int, tuple[int, int]] = {}
        self._previews: dict[int, tuple[int, Picture]] = {}
        """The latest one of each image on its way by its number, the newest last."""
        self._future: Any = None
        self._let_go: Callable[[], Any] | None = None
        """What ends it where it waits or is drawn."""
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._listeners: list[Hear] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in OVER

    @property
    def left(self) -> float:
        """Seconds until nobody wants it."""
        return self.arrived + self.timeout - time.monotonic()

    @property
    def preview(self) -> Picture | None:
        """The newest preview of an image that is on its way, or None."""
        with self._lock:
            return next((picture for _, picture in reversed(self._previews.values())), None)

    @property
    def outcome(self) -> str:
        """How it ended: succeeded, cancelled, late, refused or failed."""
        return self.state if self.state != "failed" else outcome_of(self.error)

    @property
    def nbytes(self) -> int:
        """Bytes of its pictures: once it is over, nothing else of it takes memory to speak of."""
        with self._lock:
            return sum(len(picture.data) for picture in self.pictures.values())

    @property
    def progress(self) -> dict[str, Any]:
        """Evaluations done of all, images done of all, and while known the place in the queue and the seconds left."""
        with self._lock:
            done, total = (sum(counts) for counts in zip(*self._steps.values(), strict=True)) if self._steps else (0, 0)
            said: dict[str, Any] = {
                "steps": done,
                "total_steps": total,
                "images": len(self.pictures),
                "total_images": self.work.images,
                "queue_position": None,
                "seconds_left": None,
            }
        if (future := self._future) is not None:
            told = future.progress()
            said |= {"steps": told.done, "total_steps": told.total}
            said |= {"queue_position": told.position, "seconds_left": told.seconds}
        return said

    def now(self) -> Moment:
        """Return how far it is, none of which changes while that is said."""
        with self._lock:
            return Moment(self.state, self.error, self.finished, self.facts)

    def listen(self, hear: Hear) -> Callable[[], None]:
        """Have a function called with every event from now on, and return what ends that.

        It is told at once of the pictures that are there, and of the end of a job that is over.
        """
        with self._lock:
            for index, picture in self.pictures.items():
                hear(Pictured(index, picture))
            if self.is_over:
                hear(Ended(self.state, self.error))
                return lambda: None
            self._listeners.append(hear)

        def stop() -> None:
            with self._lock:
                if hear in self._listeners:
                    self._listeners.remove(hear)

        return stop

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, and tell whether it came."""
        return self._over.wait(timeout)

    def cancel(self) -> bool:
        """Drop what is not done, and tell whether it was not over before."""
        return self.end("cancelled", CancelledError())

    def waits(self, let_go: Callable[[], Any]) -> None:
        """Note that it has no batcher yet; `let_go` is called when it ends before it has one."""
        with self._lock:
            if not self.is_over:
                self._let_go = let_go
                return
        let_go()

    def started(self, future: Any) -> None:
        """Note what a batcher returned, and that the request is in its queue."""
        with self._lock:
            if not self.is_over:
                self._future, self._let_go = future, future.cancel
                if self.state == "loading":
                    self.state = "queued"
                    self._tell(Queued())
                return
        future.cancel()

    def admitted(self) -> None:
        """Note that an image of it has a slot."""
        with self._lock:
            if not self.is_over:
                self.state = "running"

    def stepped(self, index: int, done: int, total: int) -> None:
        """Note a step of an image."""
        with self._lock:
            if not self.is_over:
                self.state = "running"
                self._steps[index] = (done, total)
                self._tell(Stepped(index, done, total))

    def previewed(self, index: int, number: int, picture: Picture) -> None:
        """Note a preview, unless a later one of its image is there, or the image: they are encoded side by side."""
        with self._lock:
            before = self._previews.get(index)
            late = index in self.pictures or (before is not None and number <= before[0])
            if not self.is_over and not late:
                self._previews.pop(index, None)
                self._previews[index] = number, picture
                self._tell(Previewed(index, number, picture))

    def pictured(self, index: int, picture: Picture) -> None:
        """Note a picture; the same again changes nothing."""
        with self._lock:
            if not self.is_over and index not in self.pictures:
                self.pictures[index] = picture
                self._previews.pop(index, None)
                self._tell(Pictured(index, picture))

    def end(self, state: State, error: BaseException | None = None, facts: Mapping[str, Any] | None = None) -> bool:
        """End the job once, and tell whether it was not over before; only what is said of it is kept."""
        with self._lock:
            if self.is_over:
                return False
            self.state, self.error, self.finished = state, error, time.time()
            self.facts = dict(facts or {})
            self._previews.clear()
            if state != "succeeded":
                self.pictures.clear()
            let_go, self._let_go, self._future = self._let_go, None, None
            kept = {"num_images_per_prompt": self.work.images}  # pictures it starts from are large
            self.work = replace(self.work, arguments=kept)
            _without_frames(error)
            if self._listeners:  # who is about to ask for the pictures
                self.asked = time.monotonic()
            self._tell(Ended(state, error))
            self._listeners.clear()
            self._over.set()
        if let_go is not None:
            let_go()
        return True

    def _tell(self, event: Event) -> None:
        for hear in tuple(self._listeners):
            hear(event)


def facts_of(job: Job, result: GenerationResult[Any]) -> dict[str, Any]:
    """Return what is said with a job's result."""
    timings = asdict(result.timings)
    timings["encode_image"] = sum(picture.encode_seconds for picture in job.pictures.values())
    timings["total"] = time.monotonic() - job.arrived
    request = result.request
    said = {} if request is None else {
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
    }  # fmt: skip
    cut = {"warnings": list(result.warnings), "tokens_cut": result.tokens_cut}
    return {"timings": timings, **cut, "parameters": said}


def _without_frames(error: BaseException | None) -> None:
    """Drop the frames of an error and of those that led to it: pictures and requests are in their variables."""
    seen = set[int]()  # they may lead to each other
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
