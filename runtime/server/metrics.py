"""What Prometheus reads: counts, times and states of the server, of its models, and of every request."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..batcher.stats import Observer
from ..service import Job, Service
from ..service.counts import Figures, ServiceObserver, memory_of
from ..service.work import Task

TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
"""Seconds of requests and of what they wait for."""
SHORT_TIMES = (0.001, 0.0025, *TIMES)
"""Seconds of steps and stages: milliseconds on a GPU, minutes on a processor."""
STAGES = ("tokenize", "encode", "prepare", "denoise", "decode", "encode_image")
GONE = 499
"""What is noted for a client that went away before its answer, after nginx."""
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "DELETE")
STATES = ("loading", "ready", "draining", "failed")

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "step_seconds": ("Time of a step by the network rows it computed.", ("model", "rows"), SHORT_TIMES),
    "stage_seconds": ("Time of a request's stages.", ("model", "stage"), SHORT_TIMES),
    "queue_wait_seconds": ("Time from a request's arrival to an image's slot.", ("model",), TIMES),
    "request_seconds": ("Time from a request's arrival to its last picture as bytes.", ("model", "task"), TIMES),
    "http_request_seconds": ("Time of answers, streams included.", ("route",), TIMES),
}
COUNTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that are over, by how.", ("model", "task", "outcome")),
    "images": ("Pictures that were handed over.", ("model",)),
    "tokens_cut": ("Tokens of prompts that were cut off.", ("model",)),
    "rejections": ("Requests that were not taken, by the code of the error.", ("reason",)),
    "model_loads": ("Times a bundle was opened, by how that ended.", ("model", "outcome")),
    "http_requests": ("Answers by route and status; 499: the client went away.", ("method", "route", "status")),
}
NOTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "model_load_seconds": ("Time that opening a bundle took, the last time.", ("model",)),
    "build_info": ("Which release this is.", ("version",)),
}


class Metrics(ServiceObserver):
    """All metrics of a server, in a registry of their own; what a service and its batchers tell is counted here."""

    def __init__(self) -> None:
        """Count from zero."""
        self.registry = registry = CollectorRegistry()
        self._times = {
            name: Histogram(f"latentrt_{name}", text, labels, buckets=buckets, registry=registry)
            for name, (text, labels, buckets) in HISTOGRAMS.items()
        }
        self._counts = {
            name: Counter(f"latentrt_{name}", text, labels, registry=registry)
            for name, (text, labels) in COUNTED.items()
        }
        self._values = {
            name: Gauge(f"latentrt_{name}", text, labels, registry=registry) for name, (text, labels) in NOTED.items()
        }
        self._values["build_info"].labels(metadata.version("latentrt")).set(1)
        self.open_connections = 0
        """Set by the server before every reading."""
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def watch(self, service: Service) -> None:
        """Read the states of a service and of its batchers whenever somebody asks."""
        self.registry.register(_States(service, self))

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)

    def observer(self, model: str) -> Observer:
        """Return what a model's batcher tells of its steps."""
        return _Observer(self, model)

    def answered(self, method: str, route: str, status: int, seconds: float, code: str | None) -> None:
        """Count an answer."""
        method = method if method in METHODS else "other"
        self._counts["http_requests"].labels(method, route, str(status)).inc()
        self._times["http_request_seconds"].labels(route).observe(seconds)
        if code is not None and (status < GONE or status == 503):
            self._counts["rejections"].labels(code).inc()

    def ended(self, job: Job) -> None:
        """Count a job that is over."""
        task, outcome = job.work.task, job.outcome
        self._counts["requests"].labels(job.model, task, outcome).inc()
        if job.state != "succeeded":
            return
        self._counts["images"].labels(job.model).inc(len(job.pictures))
        timings = job.facts.get("timings", {})
        self._times["request_seconds"].labels(job.model, task).observe(timings.get("total", 0.0))
        for stage in STAGES:
            if stage in timings:
                self._times["stage_seconds"].labels(job.model, stage).observe(timings[stage])
        self._counts["tokens_cut"].labels(job.model).inc(job.facts.get("tokens_cut", 0))

    def loaded(self, model: str, seconds: float | None) -> None:
        """Count a bundle that was opened in some seconds, or could not be."""
        self._counts["model_loads"].labels(model, "failed" if seconds is None else "succeeded").inc()
        if seconds is not None:
            self._values["model_load_seconds"].labels(model).set(seconds)
            for task in get_args(Task):  # from 0, so that the first failure is an increase
                self._counts["requests"].labels(model, task, "failed")


class _Observer(Observer):
    """Counts what a batcher tells; steps are told on its own thread, and cost it microseconds."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._wait = metrics._times["queue_wait_seconds"].labels(model)
        self._steps: dict[int, Any] = {}

    def stepped(self, bucket: int, used: int, seconds: float) -> None:
        if bucket not in self._steps:
            self._steps[bucket] = self._metrics._times["step_seconds"].labels(self._model, str(bucket))
        self._steps[bucket].observe(seconds)

    def admitted(self, queue_seconds: float) -> None:
        self._wait.observe(queue_seconds)


GAUGES: dict[str, str] = {
    "queue_images": "Images that wait for a slot.",
    "queue_oldest_seconds": "How long the image that came first has waited.",
    "queue_work_seconds": "Seconds of steps that everything taken still needs.",
    "running_images": "Images in slots.",
    "slots": "Images that may be in flight of a size.",
    "rows": "Network rows that they share.",
    "failures_in_a_row": "Turns of the loop that failed since a step worked.",
    "stuck_seconds": "How long the present turn of the loop has taken.",
    "tensor_bytes": "Memory of the device that buffers hold.",
}
COUNTERS: dict[str, str] = {
    "rows_used": "Network rows that had an image; over rows_run they are the occupancy.",
    "rows_run": "Network rows that were computed.",
    "rows_wasted": "Network rows that were computed for no image.",
    "steps": "Steps that were run.",
    "admissions": "Images that got a slot.",
    "swaps": "Images that left their slot for one that was due earlier.",
    "step_retries": "Steps that failed and were run again.",
    "cancellations": "Requests that were cancelled.",
    "deadlines_missed": "Requests that were not done in time.",
}


class _States(Collector):
    """The states of a service and its batchers, at the moment of reading."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    def describe(self) -> Iterable[Metric]:
        """Name what `collect` returns."""
        return self._families().values()

    def collect(self) -> Iterable[Metric]:
        """Return everything."""
        found, service = self._families(), self._service
        for state in STATES:
            found["state"].add_metric([state], float(service.state == state))
        found["connections"].add_metric([], self._metrics.open_connections)
        found["jobs_unfinished"].add_metric([], len(service.unfinished))
        found["results_bytes"].add_metric([], service.store.sweep())
        for model in service.models:
            found["model_loaded"].add_metric([model.name], float(model.batcher is not None))
            found["model_bytes"].add_metric([model.name], model.nbytes)
            found["model_requests"].add_metric([model.name], model.unfinished)
            if (batcher := model.batcher) is not None:
                for kind, counted in memory_of(batcher).items():
                    for graph, nbytes in counted.items():
                        found["memory_bytes"].add_metric([model.name, graph, kind], nbytes)
            self._add(found, model.figures, {"model": model.name})
        for replica, name, figures in service.replicas:
            self._add(found, figures, {"model": name, "replica": replica})
        return found.values()

    @staticmethod
    def _add(found: dict[str, Any], figures: Figures, labels: dict[str, str]) -> None:
        for name, value in figures.gauges.items():
            found[name].add_sample(f"latentrt_{name}", labels, value)
        for name in COUNTERS:
            found[name].add_sample(f"latentrt_{name}_total", labels, figures.counts.get(name, 0))

    @staticmethod
    def _families() -> dict[str, Any]:
        found: dict[str, Any] = {
            name: GaugeMetricFamily(f"latentrt_{name}", text, labels=["model"]) for name, text in GAUGES.items()
        }
        found |= {
            name: CounterMetricFamily(f"latentrt_{name}", text, labels=["model"]) for name, text in COUNTERS.items()
        }
        one = {
            "connections": "Connections that are open.",
            "jobs_unfinished": "Requests that are not over.",
            "results_bytes": "Memory of pictures that wait to be fetched.",
        }
        found |= {name: GaugeMetricFamily(f"latentrt_{name}", text) for name, text in one.items()}
        of_model = {
            "model_loaded": "Whether a bundle is open.",
            "model_bytes": "Memory that a bundle is reckoned to take: its files', then what opening it took.",
            "model_requests": "Requests of a model that are not over.",
        }
        found |= {
            name: GaugeMetricFamily(f"latentrt_{name}", text, labels=["model"]) for name, text in of_model.items()
        }
        text, labels = "Weights, as files have them, and buffers of a bundle's graphs.", ["model", "graph", "kind"]
        found["memory_bytes"] = GaugeMetricFamily("latentrt_memory_bytes", text, labels=labels)
        return found | {"state": GaugeMetricFamily("latentrt_state", "Which state the server is in.", labels=["state"])}
