"""A request on its way: state, progress, pictures, and those who listen to it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Literal

from ...engines.errors import DeadlineError, QueueFullError, RequestError
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


Event = Queued | Stepped | Previewed | Pictured | Ended
Hear = Callable[[Event], None]


class Job:
    """A request from its arrival to its result; for any number of threads.

    Listeners are called one event at a time, on the thread on which it happens: they must return at once.
    """

    def __init__(self, work: Work, name: str, size: Size, *, steps: bool = True) -> None:
        """A request for pictures of a size from the bundle `name`; `steps`: somebody may want to hear of them."""
        self.id = f"job-{secrets.token_hex(12)}"
        self.work, self.model, self.size, self.steps = work, name, size, steps
        self.created, self.arrived = time.time(), time.monotonic()
        self.finished: float | None = None
        """When it was over (`time.time`), or None."""
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.pictures: dict[int, Picture] = {}
        self.preview: Picture | None = None
        """The latest preview of the first unfinished image."""
        self.facts: dict[str, Any] = {}
        """What is said with the result: timings, warnings, the digest of the bundle, every parameter."""
        self.ignored: list[str] = []
        """Fields that its client gave and that mean nothing here."""
        self.fetched = False
        """Whether its client has been told how it ended."""
        self.asked = self.arrived
        """When somebody last asked for it (`time.monotonic`)."""
        self._steps: dict[int, tuple[int, int]] = {}
        self._future: Any = None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._listeners: list[Hear] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in OVER

    @property
    def outcome(self) -> str:
        """How it ended: succeeded, cancelled, late, refused or failed."""
        if self.state != "failed":
            return self.state
        if isinstance(self.error, DeadlineError):
            return "late"
        return "refused" if isinstance(self.error, (RequestError, QueueFullError)) else "failed"

    @property
    def nbytes(self) -> int:
        """Bytes of its pictures."""
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
        if not self.is_over and self._future is not None:
            told = self._future.progress()
            said |= {"steps": told.done, "total_steps": told.total}
            said |= {"queue_position": told.position, "seconds_left": told.seconds}
        return said

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
        with self._lock:
            future = self._future
            ended = self.end("cancelled", CancelledError())
        if future is not None:
            future.cancel()
        return ended

    def started(self, future: Any) -> None:
        """Note what a batcher returned, and that the request is in its queue."""
        with self._lock:
            self._future = future
            if self.state == "loading":
                self.state = "queued"
                self._tell(Queued())
            gone = self.is_over
        if gone:
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
        """Note a preview."""
        with self._lock:
            if not self.is_over:
                self.preview = picture
                self._tell(Previewed(index, number, picture))

    def pictured(self, index: int, picture: Picture) -> None:
        """Note a picture; the same again changes nothing."""
        with self._lock:
            if not self.is_over and index not in self.pictures:
                self.pictures[index] = picture
                self._tell(Pictured(index, picture))

    def end(self, state: State, error: BaseException | None = None, facts: Mapping[str, Any] | None = None) -> bool:
        """End the job once, and tell whether it was not over before."""
        with self._lock:
            if self.is_over:
                return False
            self.state, self.error, self.finished = state, error, time.time()
            self.facts |= facts or {}
            self.preview = None
            if state != "succeeded":
                self.pictures.clear()
            self._tell(Ended(state, error))
            self._listeners.clear()
            self._over.set()
        return True

    def _tell(self, event: Event) -> None:
        for hear in tuple(self._listeners):
            hear(event)
