"""Everything that a first request would wait for, done before it: engines, buffers, captured steps and their times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...engines.progress import Progress
from .policy import UNSETTLED
from .pool import Pool

if TYPE_CHECKING:
    from .batcher import Batcher

TIMED = 4
"""Steps of each bucket that are timed, half of them on each of the two sets of buffers."""


def warm_up(batcher: Batcher, pool: Pool, request: dict[str, Any], pictures: bool, progress: Progress) -> None:
    """Open, bind, capture and time what a size needs, on the thread of the caller, which holds the session."""
    pipe, stage = batcher.pipe, f"{request['width']}x{request['height']}"
    job = batcher._job(request)
    total = 2 + len(pool.times.buckets)
    progress(f"{stage}: prompt and decoder", 0, total)
    flight = pool.opened()
    job.prepare_early()
    job.prepare()
    image = job.images[0]
    assert image.prepared is not None
    batcher._encoder.conditioning(image.prepared.inputs)
    batcher._encoder.decode(np.zeros((1, *pool.fit.latents), np.float32))
    progress(f"{stage}: encoder of pictures", 1, total)
    if pictures and pipe.bundle.has_graph("image_encoder"):
        pipe.session.encode_picture(np.zeros((1, request["height"], request["width"], 3), np.uint8))
    for number, bucket in enumerate(pool.times.buckets, 2):
        progress(f"{stage}: {bucket} rows", number, total)
        flight.time_bucket(bucket, UNSETTLED, TIMED)
    progress(f"{stage}: {len(pool.times.buckets)} widths", total, total)
