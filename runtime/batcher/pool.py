"""The images of one size: those that wait, those in flight, and a turn of the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ...engines.device import Event
from ...engines.errors import DeadlineError, EngineError
from ..loop.denoise import Mode
from ..loop.session import Session
from ..loop.shared import Key
from .encode import Encoder
from .finish import output_of
from .job import Image, Job
from .policy import StepTimes, admitted
from .prepared import Fit
from .slots import Slots

RUN_AHEAD = 2
"""Steps that are enqueued before the first of them must be done: what is admitted waits behind them."""

log = logging.getLogger(__name__)


class Pool:
    """Images that fit one set of buffers. `waiting` and `live` belong to the lock, everything else to one thread."""

    def __init__(
        self,
        session: Session,
        encoder: Encoder,
        fit: Fit,
        slots: int,
        buckets: Sequence[int],
        mode: Mode,
        lock: threading.Condition,
        settle: Callable[[Job], None],
    ) -> None:
        """Allocate nothing yet; `settle` is told of requests that are over."""
        self.fit = fit
        self.waiting: list[Image] = []
        self.live = 0
        """Images that wait or are in flight."""
        self.times = StepTimes(buckets)
        self._session, self._encoder, self._size, self._mode = session, encoder, (slots, tuple(buckets)), mode
        self._lock, self._settle = lock, settle
        self._running: dict[int, Image] = {}
        self._ahead: deque[tuple[int, Event, Event]] = deque()
        self._slots: Slots | None = None
        self._uses: set[Key] = set()

    def turn(self) -> None:
        """Drop what nobody wants any more, admit who is next, run a step of all, and finish who is done."""
        try:
            slots = self._opened()
        except Exception as error:  # the next turn would fail as well
            self.fail(error, waiting=True)
            return
        try:
            self._drop(slots)
            self._admit(slots)
            if self._running:
                self._step(slots)
                self._harvest(slots)
        except Exception as error:
            self.fail(error)

    def _opened(self) -> Slots:
        if self._slots is None:
            session, (slots, buckets) = self._session, self._size
            open_engine = session.hold(self._uses)
            self._slots = Slots(
                session.backend.device,
                session.bundle,
                open_engine,
                self.fit,
                slots,
                buckets,
                mode=self._mode,
                stream=session.stream,
            )
        return self._slots

    def _drop(self, slots: Slots) -> None:
        """Let go of images whose request is over: cancelled, too late or failed."""
        now = time.monotonic()
        with self._lock:
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
            self._settle(job)

    def _release(self, slots: Slots, slot: int) -> None:
        image = self._running.pop(slot)
        with self._lock:
            self.live -= 1
        image.prepared = None
        slots.release(slot)

    def _admit(self, slots: Slots) -> None:
        """Give slots to the images that are next."""
        with self._lock:
            candidates = [image.candidate for image in self.waiting]
            chosen = [self.waiting[index] for index in admitted(candidates, slots.used, slots.free, self.times)]
        for image in chosen:
            job, began = image.job, time.perf_counter()
            try:
                job.prepare()
                assert image.prepared is not None
                conditioning = self._encoder.conditioning(image.prepared.inputs)
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
            job.began = job.began or time.monotonic()
            with self._lock:
                self.waiting.remove(image)

    def _step(self, slots: Slots) -> None:
        """Enqueue a step of all images in flight, a second time when it failed."""
        for slot, image in self._running.items():
            assert image.prepared is not None
            draw = image.prepared.draws[image.done]
            if draw is not None and image.prepared.noise is not None:
                slots.write_noise(slot, image.prepared.noise[draw])
        stream, bucket = self._session.stream, self.times.bucket(slots.used)
        before = stream.record()
        try:
            slots.step(bucket)
        except EngineError as error:
            log.warning("a step of %d images is tried again: %s", len(self._running), error)
            before = stream.record()
            slots.step(bucket)
        self._ahead.append((bucket, before, stream.record()))
        for image in self._running.values():
            image.done += 1
        if len(self._ahead) >= RUN_AHEAD:
            bucket, before, after = self._ahead.popleft()
            after.synchronize()
            self.times.add(bucket, after.milliseconds_since(before) / 1e3)

    def _harvest(self, slots: Slots) -> None:
        """Finish the images that have had all of their steps."""
        for slot in [slot for slot, image in self._running.items() if image.done == image.candidate.evaluations]:
            image, latents = self._running[slot], slots.latents(slot)
            self._release(slots, slot)
            job = image.job
            try:
                job.outputs[image.index] = output_of(job, latents, self._encoder)
            except Exception as error:  # of this image alone
                self._end(job, error)
            if len(job.outputs) == len(job.images):
                job.finished.timings.denoise = time.monotonic() - (job.began or 0.0) - job.finished.timings.decode
                self._end(job)

    def fail(self, error: BaseException, *, waiting: bool = False) -> None:
        """End the requests in flight with an error, with `waiting` all others too, and begin anew with new buffers."""
        with self._lock:
            gone = [*self._running.values(), *(self.waiting if waiting else ())]
            self.live -= len(gone)
            self.waiting = [] if waiting else self.waiting
        log.warning("%d images of a batcher failed: %s", len(gone), error)
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
            self._session.let_go(self._uses)
            self._uses = set()
