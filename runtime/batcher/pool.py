"""The images of one size: those that wait, those in flight, and a turn of the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...engines.device import Event
from ...engines.errors import DeadlineError, EngineError
from ..drawing import PICTURES
from ..loop.denoise import Mode
from ..loop.session import Session
from ..loop.shared import Key
from .deliver import Deliverer
from .encode import Encoder
from .events import Admitted, Stepped
from .finish import draw, hear, output_of, preview
from .job import Image, Job
from .policy import StepTimes, decide
from .prepared import Fit
from .slots import Slots
from .stats import Tally

RUN_AHEAD = 2
"""Steps that are enqueued before the first of them must be done: what is admitted waits behind them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all sizes of a batcher share."""

    session: Session
    encoder: Encoder
    mode: Mode
    slots: int
    buckets: tuple[int, ...]
    lock: threading.Condition
    deliverer: Deliverer
    tally: Tally
    settle: Callable[[Job], None]
    """Is told of requests that are over."""


class Pool:
    """Images that fit one set of buffers. `waiting` and `live` belong to the lock, everything else to one thread."""

    def __init__(self, shared: Shared, fit: Fit) -> None:
        """Allocate nothing yet."""
        self.fit = fit
        self.waiting: list[Image] = []
        self.live = 0
        """Images that wait or are in flight."""
        self.times = StepTimes(shared.buckets)
        self.steps = 0
        """Steps that were enqueued."""
        self._shared = shared
        self._running: dict[int, Image] = {}
        self._ahead: deque[tuple[int, int, Event, Event]] = deque()
        self._slots: Slots | None = None
        self._uses: set[Key] = set()

    def turn(self) -> None:
        """Drop what nobody wants any more, admit who is next, run a step of all, and finish who is done."""
        try:
            slots = self.opened()
        except Exception as error:  # the next turn would fail as well
            self.fail(error, waiting=True)
            return
        try:
            self._drop(slots)
            self._admit(slots)
            if self._running:
                self._step(slots)
                self._harvest(slots)
            if not self._running:
                self._time(0)
        except Exception as error:
            self.fail(error)

    def opened(self) -> Slots:
        """Return the buffers, allocated when they are not there."""
        if self._slots is None:
            shared, session = self._shared, self._shared.session
            self._slots = Slots(
                session.backend.device,
                session.bundle,
                session.hold(self._uses),
                self.fit,
                shared.slots,
                shared.buckets,
                mode=shared.mode,
                stream=session.stream,
            )
        return self._slots

    def _drop(self, slots: Slots) -> None:
        """Let go of images whose request is over: cancelled, too late or failed."""
        now = time.monotonic()
        with self._shared.lock:
            for image in (*self.waiting, *self._running.values()):
                self._check(image.job, now)
            self.live -= sum(image.job.over for image in self.waiting)
            self.waiting = [image for image in self.waiting if not image.job.over]
        for slot in [slot for slot, image in self._running.items() if image.job.over]:
            self._release(slots, slot)

    def _check(self, job: Job, now: float) -> None:
        late = job.due is not None and now > job.due
        if job.future.cancelled():
            self._end(job)
        elif late:
            self._end(
                job, DeadlineError(f"the result was not there in time, {now - job.arrived:.1f} s after its request")
            )

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        if job.end(error):
            self._shared.settle(job)

    def _release(self, slots: Slots, slot: int) -> None:
        image = self._running.pop(slot)
        with self._shared.lock:
            self.live -= 1
        image.prepared = None
        slots.release(slot)

    def _admit(self, slots: Slots) -> None:
        """Give slots to the images that are next."""
        with self._shared.lock:
            if not self.waiting:
                return
            waiting, running = [image.now for image in self.waiting], [image.now for image in self._running.values()]
            decision = decide(waiting, running, self.times, time.monotonic(), slots=slots.slots)
            chosen = [self.waiting[index] for index in decision.admit]
        for image in chosen:
            job, began = image.job, time.perf_counter()
            try:
                job.prepare()
                assert image.prepared is not None
                conditioning = self._shared.encoder.conditioning(image.prepared.inputs)
            except Exception as error:  # of this request alone; its images go at the next turn
                self._end(job, error)
                continue
            job.finished.timings.encode += time.perf_counter() - began
            try:
                slot = slots.admit(image.prepared, conditioning)
            except Exception as error:
                self._end(job, error)
                raise
            self._running[slot] = image
            with self._shared.lock:
                self.waiting.remove(image)
            self._admitted(image)

    def _admitted(self, image: Image) -> None:
        job, now, image.admitted = image.job, time.monotonic(), True
        if job.began is None:
            job.began, job.finished.timings.queue = now, now - job.arrived
        self._shared.tally.count("admitted", now - job.arrived)
        if job.listener is not None:
            event = Admitted(image.index)
            self._shared.deliverer.post(job.box, (Admitted, image.index), partial(hear, job, event))

    def _step(self, slots: Slots) -> None:
        """Enqueue a step of all images in flight, a second time when it failed."""
        for slot, image in self._running.items():
            assert image.prepared is not None
            draw = image.prepared.draws[image.done]
            if draw is not None and image.prepared.noise is not None:
                slots.write_noise(slot, image.prepared.noise[draw])
        stream, used = self._shared.session.stream, slots.used
        bucket = self.times.bucket(used)
        before = stream.record()
        try:
            slots.step(bucket)
        except EngineError as error:
            log.warning("a step of %d images is tried again: %s", len(self._running), error)
            self._shared.tally.count("retried")
            before = stream.record()
            slots.step(bucket)
        self.steps += 1
        self._ahead.append((bucket, used, before, stream.record()))
        for image in self._running.values():
            image.done += 1
            if image.job.listener is not None:
                event = Stepped(image.index, image.done, image.candidate.evaluations)
                self._shared.deliverer.post(image.job.box, (Stepped, image.index), partial(hear, image.job, event))
        self._time(RUN_AHEAD - 1)

    def _time(self, most: int) -> None:
        """Wait until so many steps at most are not done, and take note of what the others took."""
        while len(self._ahead) > most:
            bucket, used, before, after = self._ahead.popleft()
            after.synchronize()
            seconds = after.milliseconds_since(before) / 1e3
            self.times.add(bucket, seconds)
            self._shared.tally.stepped(bucket, used, seconds)

    def time_bucket(self, bucket: int, settling: int, timed: int) -> None:
        """Run steps of a bucket while nothing is in flight: some until it is captured, and some more to be timed."""
        slots, stream = self.opened(), self._shared.session.stream
        for _ in range(settling):
            slots.step(bucket)
        stream.synchronize()
        before = stream.record()
        for _ in range(timed):
            slots.step(bucket)
        after = stream.record()
        after.synchronize()
        self.times.set(bucket, after.milliseconds_since(before) / 1e3 / timed)

    def _harvest(self, slots: Slots) -> None:
        """Finish the images that have had all of their steps, and show those that are to be seen on their way."""
        for slot, image in list(self._running.items()):
            if image.done in image.job.previews and image.done < image.candidate.evaluations:
                self._preview(slots, slot, image)
            if image.done == image.candidate.evaluations:
                self._finish(slots, slot, image)

    def _preview(self, slots: Slots, slot: int, image: Image) -> None:
        job, latents = image.job, slots.latents(slot)
        if job.future.cancelled():
            return
        try:
            output = self._shared.encoder.decode(latents)[PICTURES["pil"]][0]
        except EngineError as error:
            log.warning("a preview was left out: %s", error)
            return
        number = job.previews[image.done]
        work = partial(preview, job, image.index, number, output)
        self._shared.deliverer.post(job.box, ("preview", image.index, number), work)

    def _finish(self, slots: Slots, slot: int, image: Image) -> None:
        job, latents = image.job, slots.latents(slot)
        self._release(slots, slot)
        try:
            output = output_of(job, latents, self._shared.encoder, self._shared.tally)
        except Exception as error:  # of this image alone
            self._end(job, error)
            return
        job.finished_images.add(image.index)
        self._shared.deliverer.post(job.box, ("drawn", image.index), partial(draw, job, image.index, output))
        if len(job.finished_images) == len(job.images):
            job.finished.timings.denoise = time.monotonic() - (job.began or 0.0) - job.finished.timings.decode
            self._end(job)

    def fail(self, error: BaseException, *, waiting: bool = False) -> None:
        """End the requests in flight with an error, with `waiting` all others too, and begin anew with new buffers."""
        with self._shared.lock:
            gone = [*self._running.values(), *(self.waiting if waiting else ())]
            self.live -= len(gone)
            self.waiting = [] if waiting else self.waiting
        log.warning("%d images of a batcher failed: %s", len(gone), error)
        self._shared.tally.failed_turn()
        self._running.clear()
        for image in gone:
            self._end(image.job, error)
        try:
            self.close()
        except Exception as second:  # of a device that is lost
            log.warning("buffers of a batcher were not freed: %s", second)

    def close(self) -> None:
        """Free the buffers; calling it again does nothing."""
        slots, self._slots = self._slots, None
        self._ahead.clear()
        try:
            if slots is not None:
                slots.close()
        finally:
            self._shared.session.let_go(self._uses)
            self._uses = set()
