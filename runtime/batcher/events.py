"""What a caller learns of a request: events while its images are drawn, how far it has come, the future of its result.

Events of one request come one after the other, on a thread beside the loop. A listener that is slow misses steps, and
nothing else: of the steps of an image that it has not heard of yet, only the last one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..request import GenerationRequest
from ..result import GenerationResult


@dataclass(frozen=True)
class Admitted:
    """Image `index` of the request has a slot for the first time."""

    index: int


@dataclass(frozen=True)
class Stepped:
    """Image `index` has had `done` of its `total` evaluations of the network."""

    index: int
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Previewed:
    """A picture of image `index` on its way, the `number`-th of those asked for, from 1.

    It is what the network's last prediction speaks of: the picture without the noise that is still in the latents.
    """

    index: int
    number: int
    picture: Image.Image


@dataclass(frozen=True, eq=False)
class Drawn:
    """Image `index` is finished: the picture, or the array [...] of the request's `output_type`, and its seed."""

    index: int
    picture: Any
    seed: int


Event = Admitted | Stepped | Previewed | Drawn
Listener = Callable[[Event], object]
"""Is called with each event."""

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class JobProgress:
    """How far a request has come.

    state         queued until one of its images has a slot
    done, total   evaluations of the network, over all of its images
    images_done   images that are finished, of `images`
    position      images that come before its next one in the queue of its size; None once none of its own waits
    seconds       an estimate of the time until it is done; None before a step of its size was timed, 0 when it is over
    """

    state: State
    done: int
    total: int
    images_done: int
    images: int
    position: int | None
    seconds: float | None


class BatchFuture(Future[GenerationResult[Any]]):
    """The future of a request's result. `cancel` works until the result is there, also while images are drawn."""

    def __init__(self, request: GenerationRequest, seeds: list[int], progress: Callable[[], JobProgress]) -> None:
        """Take the checked request with every default filled in, and the seed of every image."""
        super().__init__()
        self.request = request
        self.seeds = seeds
        self._progress = progress

    def progress(self) -> JobProgress:
        """Return how far the request has come; any thread may ask, at any time."""
        return self._progress()
