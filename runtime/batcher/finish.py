"""The end of an image and of a request: latents to pixels beside the loop's steps, pictures and results on threads."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image

from ...engines.device import Array
from ...engines.errors import EngineError
from ..drawing import PICTURES
from ..finite import NOT_FINITE, check_pixels
from .encode import Encoder
from .events import Drawn, Event, Previewed
from .job import Job
from .stats import Tally


def output_of(job: Job, latents: Array, encoder: Encoder, tally: Tally) -> Array:
    """Return an image as its request wants it, from latents [1, C, h, w]; raises `EngineError` for what is no number.

    One image is decoded at a time: a picture then depends on itself alone.
    """
    if not np.isfinite(latents).all():
        raise EngineError(NOT_FINITE.format(stage="denoiser", what="latents"))
    if job.call.output_type == "latent":
        return latents[0]
    began = time.perf_counter()
    decoded = encoder.decode(latents, job.decoding)
    check_pixels(decoded["pixels"])
    seconds = time.perf_counter() - began
    job.finished.timings.decode += seconds
    tally.tell("decoded", seconds)
    picture: Array = decoded[PICTURES[job.call.output_type]][0]
    return picture


def picture_of(job: Job, output: Array) -> Array | Image.Image:
    """Return what a caller gets of an output: a picture, pasted where its part was cut, or the array."""
    if job.call.output_type != "pil":
        return output
    drawn = Image.fromarray(output)
    return job.call.pictures.put_back(drawn) if job.call.pictures else drawn


def draw(job: Job, index: int, output: Array) -> None:
    """Make the picture of an image, and show it to the request's listener; on a thread beside the loop."""
    try:
        job.pictures[index] = picture = picture_of(job, output)
    except Exception as error:
        job.error = job.error or error
        return
    job.tell(Drawn(index, picture, job.future.seeds[index]))


def preview(job: Job, index: int, number: int, output: Array) -> None:
    """Show a picture of an image on its way, unless the request is over; on a thread beside the loop."""
    if not job.over:
        picture = Image.fromarray(output)
        job.tell(Previewed(index, number, job.call.pictures.put_back(picture) if job.call.pictures else picture))


def hear(job: Job, event: Event) -> None:
    """Tell a request's listener of an event, unless that was cancelled or failed; on a thread beside the loop."""
    if job.error is None and not job.future.cancelled():
        job.tell(event)


def settle(job: Job, tally: Tally) -> None:
    """Give a request's future its result or its error, unless it was cancelled; on a thread beside the loop."""
    try:
        _settle(job, tally)
    finally:
        job.let_go()


def _settle(job: Job, tally: Tally) -> None:
    if not job.future.set_running_or_notify_cancel():
        tally.count("cancelled")
        return
    try:
        if job.error is None:
            _complete(job)
    except Exception as error:
        job.error = error
    if job.error is None:
        tally.count("finished", job.finished.timings)
        job.future.set_result(job.finished)
    else:
        tally.failed(job.error)
        job.future.set_exception(job.error)


def _complete(job: Job) -> None:
    """Fill in a request's result."""
    pictures, finished = [job.pictures[image.index] for image in job.images], job.finished
    finished.images = pictures if job.call.output_type == "pil" else np.stack(pictures)
    finished.timings.steps = sum(image.done for image in job.images)
    finished.timings.total = time.monotonic() - job.arrived
    job.pictures = {}
