"""Everything that a first request would wait for, done before it: engines, buffers, captured steps and their times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ...engines.engine import Shapes
from ...engines.errors import MissingPlanError, RequestError
from ...engines.progress import Progress
from ..batches import Arrays
from ..loop.decoding import GRAPHS, WHOLE, Decoding, shown_by
from ..loop.wiring import wired_shapes
from ..pipeline import Pipeline
from ..warm_up import blank_request
from .flight import Shared, slot_shapes
from .job import Job
from .pool import Pool
from .prepared import Fit
from .times import UNSETTLED

ROUNDS = 3
"""Times that every bucket is timed, by turns: a device may change its speed. The fastest time counts."""
TIMED = 2
"""Steps of a bucket in each of them, one on each of the two sets of buffers."""


def jobs_for(
    make: Callable[[Mapping[str, Any]], Job], pipe: Pipeline, size: tuple[int, int], rows: int, given: Mapping[str, Any]
) -> Iterator[Job]:
    """Yield requests that stand for those of a size, of so many rows at most and with the arguments that are given.

    Where engines are for fixed shapes there is one that skips layers, too: its steps have engines of their own.
    """
    arguments = {**blank_request(pipe.bundle.manifest, *size), **given}
    job = make(arguments)
    yield job
    skipped = pipe.bundle.manifest.guidance.skipped
    if skipped is not None and not pipe.backend.dynamic:
        everywhere = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
        skipping = make({"skip_guidance_layers": skipped.layers, **everywhere, **arguments})
        if skipping.fit != job.fit and skipping.images[0].candidate.held <= rows:
            yield skipping


def warm_up(pool: Pool, job: Job, pictures: bool, progress: Progress) -> frozenset[Hashable]:
    """Open, bind, capture and time what a size needs, on a thread that holds the session; return what stands for it.

    `job` is a request of that size, which is not drawn. What is in flight makes room, and goes on later.
    """
    session, request, buckets = job.pipe.session, job.call.request, pool.times.buckets
    what = f"{request.width}x{request.height}" + (" with skipped layers" if job.table.skips else "")
    report = partial(_report, progress, what, 3 + len(buckets))
    report("prompt and decoder", 0)
    flight, opened = pool.at_rest(), job.needs
    decodings = {job.decoding, shown_by(session.bundle, job.decoding)} if pictures else {job.decoding}
    try:
        job.prepare_early()
        job.prepare()
        image = job.images[0]
        assert image.prepared is not None
        session.prompts.clear()  # so that all graphs run
        flight.encoder.conditioning(image.prepared.inputs)
        for decoding in decodings:
            flight.encoder.decode(np.zeros((1, *pool.fit.latents), np.float32), decoding)
        report("encoder of pictures", 1)
        if pictures and session.bundle.has_graph("image_encoder"):
            session.encode_picture(np.zeros((1, request.height or 0, request.width or 0, 3), np.uint8))
            opened |= {"image_encoder"}
        flight.keep()
        for number, bucket in enumerate(reversed(buckets)):  # the largest first: memory that it needs serves all
            report(f"steps of {bucket} rows", 2 + number)
            flight.seconds_of(bucket, UNSETTLED)
        report("times of steps", 2 + len(buckets))
        rounds = [[flight.seconds_of(bucket, TIMED) for bucket in buckets] for _ in range(ROUNDS)]
        for bucket, times in zip(buckets, zip(*rounds, strict=True), strict=True):
            pool.times.set(bucket, min(times))
        report("ready", 3 + len(buckets))
    except BaseException:
        pool.close()  # nothing is in flight
        raise
    return opened | decodings


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
        if job.previews and session.bundle.has_graph(GRAPHS["tiny"]):
            shapes[GRAPHS["tiny"]] = shapes[decoding.graph]
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
