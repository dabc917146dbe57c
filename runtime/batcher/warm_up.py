"""Everything that a first request would wait for, done before it: engines, buffers, captured steps and their times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ...engines.bundle import Bundle
from ...engines.engine import Shapes
from ...engines.errors import MissingPlanError, RequestError
from ...engines.progress import Progress
from ..batches import Arrays
from ..loop.decoding import WHOLE, Decoding
from ..loop.wiring import wired_shapes
from .encode import Encoder
from .flight import Shared, slot_shapes
from .job import Job
from .policy import UNSETTLED
from .pool import Pool
from .prepared import Fit

TIMED = 4
"""Steps of each bucket that are timed, half of them on each of the two sets of buffers."""


def warm_up(pool: Pool, job: Job, encoder: Encoder, pictures: bool, progress: Progress) -> None:
    """Open, bind, capture and time what a size needs, on a thread that holds the session.

    `job` is a request of that size, which is not drawn. What is in flight makes room, and goes on later.
    """
    session, request, buckets = job.pipe.session, job.call.request, pool.times.buckets
    report = partial(_report, progress, f"{request.width}x{request.height}", 2 + len(buckets))
    report("prompt and decoder", 0)
    flight = pool.at_rest()
    try:
        job.prepare_early()
        job.prepare()
        image = job.images[0]
        assert image.prepared is not None
        encoder.conditioning(image.prepared.inputs)
        encoder.decode(np.zeros((1, *pool.fit.latents), np.float32), job.decoding)
        report("encoder of pictures", 1)
        if pictures and session.bundle.has_graph("image_encoder"):
            session.encode_picture(np.zeros((1, request.height or 0, request.width or 0, 3), np.uint8))
        flight.keep()
        for number, bucket in enumerate(reversed(buckets)):  # the largest first: memory that it needs serves all
            report(f"steps of {bucket} rows", 2 + number)
            flight.time_bucket(bucket, UNSETTLED, TIMED)
        report("ready", 2 + len(buckets))
    except BaseException:
        pool.close()  # nothing is in flight
        raise


def _report(progress: Progress, size: str, total: int, what: str, done: int) -> None:
    progress(f"{size}: {what}", done, total)


def check_engines(job: Job, shared: Shared, sizes: Sequence[str]) -> None:
    """Raise `RequestError` for a request whose engines would have to be built, with the sizes that have theirs.

    It is decoded in the first way that there are engines for.
    """
    request, session, missing = job.call.request, shared.session, None
    for decoding in job.call.decodings:
        shapes = engine_shapes(session.bundle, job.blank_row(), job.fit, shared.slots, shared.buckets, decoding)
        if job.call.pictures is None:
            shapes.pop("image_encoder", None)
        try:
            session.backend.prepare(session.bundle, shapes, build=False)
        except MissingPlanError as error:
            missing = missing or error
        else:
            job.decode_as(decoding)
            return
    raise RequestError(
        f"{request.width}x{request.height} has no engines, and none are built for a request: "
        f"the sizes here are {', '.join(sizes) or 'none yet'}; {missing}"
    ) from missing


def engine_shapes(
    bundle: Bundle, row: Arrays, fit: Fit, slots: int, buckets: Sequence[int], decoding: Decoding = WHOLE
) -> dict[str, list[Shapes]]:
    """Return the input shapes of all engines that requests like one need in a batcher, by graph.

    `row` has the inputs of one network row, and those of one image in the loop.
    """
    shapes = {name: [each] for name, each in wired_shapes(bundle, *row, decoding).items()}
    shapes |= slot_shapes(bundle, fit, slots, buckets)
    if bundle.has_graph("image_encoder"):
        sides = [side * bundle.manifest.latent.downscale for side in fit.latents[1:]]
        specs = bundle.graph("image_encoder").inputs
        shapes["image_encoder"] = [{spec.name: (1, *sides, int(spec.shape[3])) for spec in specs}]
    return shapes
