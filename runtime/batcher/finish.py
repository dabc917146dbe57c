"""The end of an image: latents to pixels beside the loop, and results handed over on a thread of their own."""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue

import numpy as np
from PIL import Image

from ...engines.device import Array
from ...engines.errors import EngineError
from ..drawing import PICTURES
from ..finite import NOT_FINITE
from .encode import Encoder
from .job import Job

log = logging.getLogger(__name__)


def output_of(job: Job, latents: Array, encoder: Encoder) -> Array:
    """Return an image as its request wants it, from latents [1, C, h, w]; raises `EngineError` for what is no number.

    One image is decoded at a time: a picture then depends on itself alone.
    """
    if not np.isfinite(latents).all():
        raise EngineError(NOT_FINITE.format(stage="denoiser", what="latents"))
    if job.call.output_type == "latent":
        return latents[0]
    began = time.perf_counter()
    decoded = encoder.decode(latents)
    if not np.isfinite(decoded["pixels"]).all():
        raise EngineError(NOT_FINITE.format(stage="decoder", what="pixels"))
    job.finished.timings.decode += time.perf_counter() - began
    picture: Array = decoded[PICTURES[job.call.output_type]][0]
    return picture


class Finisher:
    """A thread that makes results of finished requests: conversions and callbacks of futures hold up no step."""

    def __init__(self) -> None:
        """Start the thread."""
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="latentrt finisher", daemon=True)
        self.thread.start()

    def hand_over(self, job: Job) -> None:
        """Let the thread settle a request's future, once."""
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread when everything has been handed over; calling it again does nothing."""
        self._jobs.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                _settle(job)
            except BaseException:  # of a callback that ends its thread
                log.exception("a callback of a future failed")


def _settle(job: Job) -> None:
    """Give a request's future its result or its error, unless it was cancelled."""
    if not job.future.set_running_or_notify_cancel():
        return
    try:
        if job.error is None:
            _complete(job)
    except Exception as error:
        job.error = error
    if job.error is None:
        job.future.set_result(job.finished)
    else:
        job.future.set_exception(job.error)


def _complete(job: Job) -> None:
    """Fill in a request's result."""
    outputs, pictures, finished = [job.outputs[image.index] for image in job.images], job.call.pictures, job.finished
    if job.call.output_type == "pil":
        drawn = [Image.fromarray(each) for each in outputs]
        finished.images = [pictures.put_back(each) for each in drawn] if pictures else drawn
    else:
        finished.images = np.stack(outputs)
    finished.timings.steps = sum(image.done for image in job.images)
    finished.timings.total = time.monotonic() - job.arrived
