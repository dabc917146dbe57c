"""What `submit` returns: the future of a request's result, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from ..request import GenerationRequest
from ..result import GenerationResult

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
