"""What of a job that is over is still alive: its pictures and what is said of it, and nothing that is large."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.result import GenerationResult
from latentrt.runtime.service import Work
from PIL import Image

from .conftest import Served, opening_held, turns_held, until

SMALL: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "strength": 1.0}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    found = {name: Bundle.open(ensure_bundle()) for name in ("one", "two")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batcher, "warm_up", lambda *_: None)
        with Served(found) as running:
            yield running


def alive() -> int:
    """Return how many raw pictures and results of batchers there are."""
    gc.collect()
    return sum(issubclass(type(each), Image.Image | GenerationResult) for each in gc.get_objects())


def submitted(served: Served, gone: list[weakref.ref[Image.Image]], timeout: float | None, **more: Any) -> Any:
    """Submit an edit that is kept; its pictures live on in its job alone."""
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "white")]
    gone += map(weakref.ref, pictures)
    work = Work({**SMALL, "image": pictures[0], "mask_image": pictures[1], **more}, model="two", timeout=timeout)
    return served.service.submit(work, keep=True)


@pytest.mark.parametrize("outcome", ["succeeded", "cancelled", "late", "refused"])
def test_a_job_that_is_over_keeps_its_pictures_alone(served: Served, outcome: str) -> None:
    service, gone = served.service, list[weakref.ref[Image.Image]]()
    assert service.submit(Work({**SMALL, "strength": None}, model="two")).wait(60)  # what a batcher has of the last one
    until(lambda: not service.unfinished)
    before = alive()
    if outcome == "succeeded":
        job = submitted(served, gone, None, num_images_per_prompt=2)
        assert job.wait(60) and len(job.pictures) == 2
    elif outcome == "refused":  # with the frames of what refused it
        model = service.models.find("two")
        model.close(model.taken())
        with opening_held() as free:
            job = submitted(served, gone, None, sampler="nothing")
            free.set()
            assert job.wait(60) and job.error.__traceback__ is None
    else:
        with turns_held() as free:
            job = submitted(served, gone, 0.3 if outcome == "late" else None)
            assert len(gone) == 2 and all(each() for each in gone)
            time.sleep(0.4 if outcome == "late" else 0.0)
            if outcome == "cancelled":
                job.cancel()
            free.set()
            assert job.wait(60)
    assert job.outcome == outcome and service.store.find("", job.id) is job
    until(lambda: not service.unfinished and alive() <= before)
    assert not any(each() for each in gone)
    assert job.work.images == job.progress["total_images"] == (2 if outcome == "succeeded" else 1)


def test_base64_is_not_kept_beside_the_bytes(served: Served) -> None:
    job = served.service.submit(Work({**SMALL, "strength": None}, model="one"), keep=True)
    assert job.wait(60)
    (picture,) = job.pictures.values()
    before = dict(vars(picture))
    assert len(picture.text) > len(picture.data) and vars(picture) == before
