"""The images of one size: those that wait, those in flight, and a turn of the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator, Sequence

from ...engines.errors import (
    BundleError,
    DeadlineError,
    EngineError,
    MissingPlanError,
    StorageError,
    is_out_of_memory,
)
from .flight import Flight, Shared, StepFailed
from .job import Image, Job
from .policy import decide
from .prepared import Fit
from .times import StepTimes

log = logging.getLogger(__name__)


class Pool:
    """Images that fit one set of buffers. `waiting` and `live` belong to the lock, everything else to one thread."""

    def __init__(self, shared: Shared, fit: Fit) -> None:
        """Allocate nothing yet."""
        self.fit = fit
        self.waiting: list[Image] = []
        """Images without a slot, also those that had one."""
        self.known: set[Hashable] = set()
        """What stands for engines that are there, beside those of the steps: see `Job.needs`."""
        self.times = StepTimes(shared.buckets)
        self.steps = 0
        """Steps that were enqueued."""
        self._shared = shared
        self._flight: Flight | None = None

    @property
    def live(self) -> int:
        """Images that wait or are in flight."""
        flight = self._flight  # another thread may close it meanwhile
        return len(self.waiting) + (len(flight.images) if flight else 0)

    def turn(self) -> None:
        """Drop what nobody wants any more, admit who is next, run a step of all, and finish who is done."""
        try:
            flight = self.opened()
        except Exception as error:  # the next turn would fail as well
            self.fail(error, waiting=True)
            return
        try:
            self._drop(flight)
            self._admit(flight)
            if flight.images:
                self._step(flight)
            if not flight.images:
                flight.wait()
        except Exception as error:
            self.fail(error)

    def opened(self) -> Flight:
        """Return the buffers, allocated when they are not there."""
        if self._flight is None:
            self._flight = Flight(self._shared, self.fit, self.times)
        return self._flight

    def at_rest(self) -> Flight:
        """Return the buffers with nothing in flight: what was there waits to go on.

        Raises `EngineError` where there is no memory for that, and what is in flight stays there.
        """
        flight = self.opened()
        try:
            parked = not flight.images or self._park(flight, list(flight.images))
        except Exception as error:
            self.fail(error)
            raise
        if not parked:
            raise EngineError("images are in flight, and there is no memory beside their slots: warm up when none are")
        return flight

    def _drop(self, flight: Flight) -> None:
        """Let go of images whose request is over: cancelled, too late or failed."""
        now = time.monotonic()
        with self._shared.lock:
            for image in (*self.waiting, *flight.images.values()):
                self._check(image.job, now)
            gone = [image for image in self.waiting if image.job.over]
            self.waiting = [image for image in self.waiting if not image.job.over]
        for image in gone:
            image.leave()
        for slot in [slot for slot, image in flight.images.items() if image.job.over]:
            flight.release(slot)

    def _check(self, job: Job, now: float) -> None:
        if job.future.cancelled():
            self._shared.end(job)
        elif job.due is not None and now > job.due:
            why = f"the result was not there in time, {now - job.arrived:.1f} s after its request"
            self._shared.end(job, DeadlineError(why))

    def _admit(self, flight: Flight) -> None:
        """Let images leave their slots that others need more, and give slots to those that are next."""
        with self._shared.lock:
            if not self.waiting:
                return
            waiting = list(self.waiting)
        running = list(flight.images.items())
        seen = [image.now for image in waiting], [image.now for _, image in running]
        decision = decide(*seen, self.times, time.monotonic(), slots=self._shared.slots, parking=flight.parking)
        if decision.swap_out:
            if not self._park(flight, [running[index][0] for index in decision.swap_out]):
                return
            for _ in decision.swap_out:
                self._shared.tally.count("swapped")
        for image in [waiting[index] for index in decision.admit]:
            if image.parked is not None:
                flight.resume(image)
            elif not flight.begin(image):
                continue
            with self._shared.lock:
                self.waiting.remove(image)

    def _park(self, flight: Flight, leaving: Sequence[int]) -> bool:
        """Let images wait to go on, and tell whether there was memory for that."""
        if not flight.park(leaving):
            return False
        with self._shared.lock:
            self.waiting += [flight.images.pop(slot) for slot in leaving]
        return True

    def _step(self, flight: Flight) -> None:
        """Run a step, each image's by itself when that of all fails."""
        try:
            flight.step()
        except StepFailed as failed:
            error = failed.__cause__ or failed
            images = list(flight.images.values())
            if len(images) == 1 or not self._park(flight, list(flight.images)):
                raise error from None
            log.warning("each of %d images is tried by itself: %s", len(images), str(error))
            self._one_by_one(images)
            return
        self.steps += 1
        flight.harvest()

    def _one_by_one(self, images: Sequence[Image]) -> None:
        """Run the step that failed for each image by itself, in new buffers: the request whose step fails again fails.

        The others wait to go on from there. All of them are among those that wait.
        """
        self.close()
        before = self.steps
        last: BaseException | None = None
        for image in images:
            if image.job.over:  # its request failed with another image
                continue
            try:
                flight = self.opened()
                slot = flight.resume(image)
                flight.step()
                flight.wait()
                self.steps += 1
                flight.harvest()
                if image.done < image.candidate.evaluations and not flight.park([slot]):
                    raise EngineError("there is no memory for an image beside the slots")
                with self._shared.lock:
                    if flight.images.pop(slot, None) is None:
                        self.waiting.remove(image)
            except Exception as error:
                last = (error.__cause__ or error) if isinstance(error, StepFailed) else error
                self._shared.end(image.job, last)
                self.close()
        if last is not None and self.steps == before:
            self._count(last)

    def fail(self, error: BaseException, *, waiting: bool = False) -> None:
        """End the requests in flight with an error, with `waiting` all others too, and begin anew with new buffers."""
        with self._shared.lock:
            gone = [*(self._flight.images.values() if self._flight else ()), *(self.waiting if waiting else ())]
            self.waiting = [] if waiting else self.waiting
        log.warning("%d images of a batcher failed: %s", len(gone), str(error))
        self._count(error)
        for image in gone:
            self._shared.end(image.job, error)
        try:
            for image in gone:
                image.leave()
            self.close()
        except Exception as second:  # of a device that is lost
            log.warning("buffers of a batcher were not freed: %s", str(second))

    def _count(self, error: BaseException) -> None:
        """Count a turn that failed, unless another process would not mend it: for a file, or a size that never fits."""
        never_fits = is_out_of_memory(error) and not self.times.seconds  # also where a first capture has no room
        if not never_fits and not isinstance(error, (BundleError, MissingPlanError, StorageError)):
            self._shared.tally.failed_turn()

    def memory(self) -> Iterator[tuple[str, int]]:
        """Yield graphs beside the steps, several times perhaps, with the bytes of their buffers; on any thread."""
        flight = self._flight
        return iter(()) if flight is None else flight.encoder.memory()

    def close(self) -> None:
        """Free the buffers; calling it again does nothing."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.close()
