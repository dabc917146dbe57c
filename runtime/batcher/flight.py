"""The images in flight of one size, in their slots: in and out of them, a step of all, and their ends."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Event
from ...engines.engine import Shapes
from ...engines.errors import EngineError
from ...engines.host import HostDevice
from ..loop.denoise import Mode
from ..loop.session import Session
from ..loop.shared import Key
from ..loop.wiring import Notes
from .deliver import Deliverer
from .encode import Encoder
from .events import Admitted, Stepped
from .finish import draw, hear, output_of, preview
from .job import Image, Job
from .prepared import Fit, Parked
from .slots import Slots
from .stats import Tally
from .times import StepTimes

RUN_AHEAD = 2
"""Steps that are enqueued before the first of them must be done: what is admitted waits behind them."""

MOST_KEPT = 64
"""Engines and bound graphs that stay open for the requests of one size."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all sizes of a batcher share."""

    session: Session
    mode: Mode
    slots: int
    buckets: tuple[int, ...]
    lock: threading.Condition
    deliverer: Deliverer
    tally: Tally
    settle: Callable[[Job], None]
    """Is told of requests that are over."""

    def end(self, job: Job, error: BaseException | None = None) -> None:
        """End a request, with the error that was its end, unless it is over."""
        if job.end(error):
            self.settle(job)


class StepFailed(Exception):
    """A step could not be enqueued, also when it was tried again; what it reads is as it was."""


class Flight:
    """Buffers and who is in them."""

    def __init__(self, shared: Shared, fit: Fit, times: StepTimes) -> None:
        """Allocate the buffers."""
        self._shared, self._times, session = shared, times, shared.session
        self._uses: set[Key] = set()
        self._ahead: deque[tuple[int, int, Event, Event]] = deque()
        self._spare: list[Parked] = []  # places beside the slots that no image is in
        self.images: dict[int, Image] = {}
        """Who is in which slot."""
        self.parking: int | None = None
        """Images that may be beside the slots at a time: as many as slots, none once there was no memory for it."""
        self.encoder = Encoder(session, open_engine := session.hold(self._uses))
        try:
            if not session.backend.dynamic:  # of all buckets at once: their engines share weights
                session.backend.prepare(session.bundle, slot_shapes(session.bundle, fit, shared.slots, shared.buckets))
            self.slots = Slots(
                session.backend.device,
                session.bundle,
                open_engine,
                fit,
                shared.slots,
                shared.buckets,
                compiles_shapes=session.backend.compiles_shapes,
                mode=shared.mode,
                stream=session.stream,
            )
        except BaseException:
            session.let_go(self._uses)
            raise
        times.restart()

    def keep(self) -> None:
        """Let what encodes pictures stay open, for the next one."""
        if len(self._uses) < MOST_KEPT:
            self._shared.session.keep(self._uses)

    def begin(self, image: Image) -> bool:
        """Give an image its first slot, and tell whether it could be prepared; if not, its request is over."""
        job, began, shared = image.job, time.perf_counter(), self._shared
        try:
            job.prepare()
            self.keep()
            assert image.prepared is not None
            conditioning = self.encoder.conditioning(image.prepared.inputs)
        except Exception as error:  # of this request alone
            shared.end(job, error)
            return False
        seconds = time.perf_counter() - began
        job.finished.timings.encode += seconds
        self._times.note("encode", seconds)
        try:
            self.images[self.slots.admit(image.prepared, conditioning, image.now.width)] = image
        except Exception as error:
            shared.end(job, error)
            raise
        now, image.admitted = time.monotonic(), True
        if job.began is None:
            job.began, job.finished.timings.queue = now, now - job.arrived
        shared.tally.count("admitted", now - job.arrived)
        if job.listener is not None:
            shared.deliverer.post(job.box, (Admitted, image.index), partial(hear, job, Admitted(image.index)))
        return True

    def resume(self, image: Image) -> int:
        """Let an image go on that had to leave its slot, and return its new one."""
        assert image.prepared is not None and image.parked is not None
        slot = self.slots.resume(image.prepared, image.parked, image.done)
        self.images[slot] = image
        self._spare.append(image.parked)
        image.parked = None
        return slot

    def park(self, leaving: Sequence[int]) -> bool:
        """Copy images out of their slots and free those, and tell whether there was memory for that.

        They are in `images` until the caller takes them out: whatever fails meanwhile, somebody answers for them.
        """
        try:
            while len(self._spare) < len(leaving):
                self._spare.append(self.slots.parking())
        except EngineError as error:
            log.warning("images keep their slots from now on: %s", str(error))
            self.parking = 0
            return False
        for slot in leaving:
            image = self.images[slot]
            image.parked = self._spare.pop()
            self.slots.park(slot, image.parked)
        for slot in leaving:
            self.slots.release(slot)
        return True

    def release(self, slot: int) -> Image:
        """Let an image leave its slot for good, and return it."""
        self.slots.release(slot)
        image = self.images.pop(slot)
        image.leave()
        return image

    def step(self) -> None:
        """Enqueue a step of all images, a second time when it failed; raises `StepFailed` when it fails again."""
        for slot, image in self.images.items():
            assert image.prepared is not None
            noise = image.prepared.noise.at(image.done, self.slots.fit.latents)
            if noise is not None:
                self.slots.write_noise(slot, noise)
        stream, used = self._shared.session.stream, self.slots.used
        bucket = self._times.bucket(used)
        before = stream.record()
        try:
            self.slots.step(bucket)
        except Exception as error:
            log.warning("a step of %d images is tried again: %s", len(self.images), str(error))
            self._shared.tally.count("retried")
            before = stream.record()
            try:
                self.slots.step(bucket)
            except Exception as second:
                raise StepFailed from second
        self._ahead.append((bucket, used, before, stream.record()))
        for image in self.images.values():
            image.done += 1
            if image.job.listener is not None:
                event = Stepped(image.index, image.done, image.candidate.evaluations)
                self._shared.deliverer.post(image.job.box, (Stepped, image.index), partial(hear, image.job, event))
        self.wait(RUN_AHEAD - 1)

    def wait(self, most: int = 0) -> None:
        """Wait until so many steps at most are not done, and take note of what the others took."""
        while len(self._ahead) > most:
            bucket, used, before, after = self._ahead.popleft()
            after.synchronize()
            seconds = after.milliseconds_since(before) / 1e3
            self._times.add(bucket, seconds)
            self._shared.tally.stepped(bucket, used, seconds)

    def harvest(self) -> None:
        """Finish the images that have had all of their steps, and show those that are to be seen on their way.

        The others then have the network rows of their next step.
        """
        for slot, image in self.images.items():  # while what the step had is there
            if image.done in image.job.previews:
                self._preview(slot, image)
        for slot, image in list(self.images.items()):
            if image.done == image.candidate.evaluations:
                self._finish(slot)
        in_part = [(slot, image) for slot, image in self.images.items() if image.candidate.guided is not None]
        for slot, image in in_part:
            if image.now.width < len(self.slots.rows_of(slot)):
                self.slots.narrow(slot)
        for slot, image in in_part:  # into rows that were kept for them, or others have left
            if image.now.width > len(self.slots.rows_of(slot)):
                self._widen(slot, image)

    def _widen(self, slot: int, image: Image) -> None:
        assert image.prepared is not None
        try:
            conditioning = self.encoder.conditioning(image.prepared.inputs)
        except Exception as error:  # of this request alone
            self._shared.end(image.job, error)
        else:
            self.slots.widen(slot, conditioning)

    def _preview(self, slot: int, image: Image) -> None:
        job = image.job
        if job.future.cancelled():
            return
        before = self.slots.before(slot)
        try:
            output = self.encoder.preview(job.clean(image.done - 1, *before), job.decoding)
        except Exception as error:  # of this picture alone
            log.warning("a preview was left out: %s", str(error))
            return
        work = partial(preview, job, image.index, number := job.previews[image.done], output)
        self._shared.deliverer.post(job.box, ("preview", image.index, number), work)

    def _finish(self, slot: int) -> None:
        latents, shared = self.slots.latents(slot), self._shared
        image, began = self.release(slot), time.perf_counter()
        job = image.job
        try:
            output = output_of(job, latents, self.encoder, shared.tally)
        except Exception as error:  # of this image alone
            shared.end(job, error)
            return
        self._times.note("decode", time.perf_counter() - began)
        job.finished_images.add(image.index)
        shared.deliverer.post(job.box, ("drawn", image.index), partial(draw, job, image.index, output))
        if len(job.finished_images) == len(job.images):
            job.finished.timings.denoise = time.monotonic() - (job.began or 0.0) - job.finished.timings.decode
            shared.end(job)

    def seconds_of(self, bucket: int, steps: int) -> float:
        """Run steps of a bucket while nothing is in flight, and return how long each took."""
        before = self._shared.session.stream.record()
        for _ in range(steps):
            self.slots.step(bucket)
        after = self._shared.session.stream.record()
        after.synchronize()
        return after.milliseconds_since(before) / 1e3 / steps

    def close(self) -> None:
        """Free the buffers; calling it again does nothing."""
        self._ahead.clear()
        with ExitStack() as closing:
            closing.callback(self._shared.session.let_go, self._uses)
            closing.callback(self.slots.close)
            closing.callback(self.encoder.close)
            while self._spare:
                closing.callback(self._spare.pop().close)


def slot_shapes(bundle: Bundle, fit: Fit, slots: int, buckets: Sequence[int]) -> dict[str, list[Shapes]]:
    """Return the input shapes of the denoiser and the step for every bucket: slots on the host, with nothing to run."""
    found: dict[str, list[Shapes]] = {}

    def open_engine(graph: GraphInfo, shapes: Shapes) -> Notes:
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        if wanted not in found.setdefault(graph.name, []):  # both sets of buffers are alike
            found[graph.name].append(wanted)
        return Notes(graph)

    device = HostDevice()
    dry = Slots(device, bundle, open_engine, fit, slots, buckets, mode="eager", stream=device.stream())
    for bucket in buckets:
        dry.bind(bucket)
    dry.close()
    return found
