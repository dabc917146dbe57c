"""What Triton's own /metrics says of the model.

Triton counts a decoupled request as a success once it is queued, and its time as that of the queueing: its own numbers
say nothing of this model. These have the names and meanings of the HTTP server's.
"""

from __future__ import annotations

from typing import Any

from ..batcher import Batcher
from ..service import Job
from ..service.counts import ServiceObserver

COUNTERS = {
    "requests": "Requests that are over, by how.",
    "images": "Pictures that were handed over.",
    "rejections": "Requests that were not taken, by the code of the error.",
    "request_seconds": "Time from requests' arrivals to their last pictures as bytes, in all.",
}
GAUGES = {
    "queue_images": "Images that wait for a slot.",
    "queue_work_seconds": "Seconds of steps that everything taken still needs.",
    "running_images": "Images in slots.",
}


class TritonMetrics(ServiceObserver):
    """Counters and gauges of Triton's, for one instance of one model."""

    def __init__(self, backend: Any, model: str, instance: str) -> None:
        """Register them; `backend` is the module of Triton's Python backend."""
        kinds, self._model, self._instance = backend.MetricFamily, model, instance
        self._families = {
            name: kinds(name=f"latentrt_{name}_total", description=text, kind=kinds.COUNTER)
            for name, text in COUNTERS.items()
        }
        gauges = {
            name: kinds(name=f"latentrt_{name}", description=text, kind=kinds.GAUGE) for name, text in GAUGES.items()
        }
        self._gauges = {
            name: family.Metric(labels={"model": model, "instance": instance}) for name, family in gauges.items()
        }
        self._families |= gauges  # a family must outlive its metrics
        self._counters: dict[tuple[str, ...], Any] = {}

    def ended(self, job: Job) -> None:
        """Count a job that is over."""
        self._add("requests", outcome=job.outcome)
        if job.state == "succeeded":
            self._add("images", len(job.pictures))
            self._add("request_seconds", job.facts.get("timings", {}).get("total", 0.0))

    def rejected(self, reason: str) -> None:
        """Count a request that was not taken."""
        self._add("rejections", reason=reason)

    def read(self, batcher: Batcher) -> None:
        """Note what there is at this moment."""
        stats = batcher.stats()
        self._gauges["queue_images"].set(stats.waiting)
        self._gauges["queue_work_seconds"].set(stats.work_seconds)
        self._gauges["running_images"].set(stats.running)

    def _add(self, name: str, value: float = 1, **labels: str) -> None:
        key = (name, *labels.values())
        if key not in self._counters:
            labels = {"model": self._model, "instance": self._instance, **labels}
            self._counters[key] = self._families[name].Metric(labels=labels)
        self._counters[key].increment(value)
