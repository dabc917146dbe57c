"""latentrt as a contender; its variant is `BACKEND/MODE`, or `BACKEND-PRECISION/MODE` for one that has a choice."""

from __future__ import annotations

import functools
import shutil
import time
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from . import LOSSY, ON_A_PROCESSOR, OWN_GRAPHS, STAGES, precision_apart

PARTS = ("prompt", "schedule", "modulation")
"""Graphs that are parts of a denoiser, beside what keeps its name."""

LIBRARIES = {
    "onnxruntime-cpu": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime-cuda": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
"""The packages that a backend may come from."""


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Contender:
    """A pipeline of latentrt; also says how long each network ran, so that everything else can be told apart."""

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        """Open the bundle; `fresh_cache` names a folder to build the engines in first, so that the build is timed.

        Engines that the ordinary cache does not have are built in `open`: a worker that only builds should run before.

        `slow` maps a graph's name to a fraction by which each of its runs is drawn out: a test of the comparison.
        """
        began = time.perf_counter()
        from ...engines.cache import EngineCache
        from ...engines.errors import RequestError
        from ...runtime.pictures import png as image
        from ...runtime.pipeline import Pipeline

        self._png = image.encode_png
        backend, _, mode = variant.partition("/")
        mode, _, lossy = mode.partition("+")
        mode = mode.partition("-")[0]  # what follows says how the bundle was made
        self._lossy = dict(LOSSY.get(lossy, {}))  # of a quantized bundle nothing is asked for
        backend, inside = precision_apart(backend)
        if backend.startswith("onnxruntime"):
            import onnxruntime  # noqa: F401
        imported = time.perf_counter()
        self._last: tuple[dict[str, Any], list[Any]] = {}, []
        self._runs: list[tuple[Any, float, float]] = []
        self._slow = {name: float(share) for name, share in (options.get("slow") or {}).items()}
        settings: dict[str, Any] = {"mode": mode or "step", "max_batch": options.get("max_batch", 4)}
        settings["prompt_cache"] = 0  # the same prompt again is encoded again, as others do it
        if mode == OWN_GRAPHS:
            settings |= {"mode": "eager", "graphs": "onnxruntime"}
        if inside is not None:
            settings["precision"] = inside
        self._on_cpu = backend in ON_A_PROCESSOR
        if self._on_cpu:
            settings["threads"] = options["threads"]
            self._watch_networks(backend)
        elif self._slow:
            raise RequestError("only engines on the CPU can be drawn out")
        build = None
        if folder := options.get("fresh_cache"):
            start = time.perf_counter()
            Pipeline.open(options["bundle"], backend, cache=EngineCache(Path(folder)), **settings).close()
            build = time.perf_counter() - start
            shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        self._pipe = Pipeline.open(options["bundle"], backend, **settings)
        self.facts: dict[str, Any] = {
            "import": imported - began,
            "build": build,
            "open": time.perf_counter() - start,
            "versions": _versions("latentrt", "numpy", *LIBRARIES[backend]),
            "options": {"backend": backend, "forecast": None, **self._lossy, **settings},
        }

    def _watch_networks(self, backend: str = "onnxruntime-cpu") -> None:
        """Note what each graph's runs cost: two clock readings a run, added up when the request is done."""
        from ...engines.onnxruntime.cpu import OnnxRuntimeBinding
        from ...engines.openvino.engine import OpenVinoBinding

        kind: Any = OpenVinoBinding if backend == "openvino" else OnnxRuntimeBinding
        run = kind._run
        clock, note, slow = time.perf_counter, self._runs.append, self._slow

        @functools.wraps(run)
        def timed(binding: Any) -> None:
            start = clock()
            run(binding)
            end = clock()
            if slow:
                end += slow.get(binding._engine.name, 0.0) * (end - start)
                while clock() < end:
                    pass
            note((binding, start, end))

        kind._run = timed

    def _network_seconds(self) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for binding, start, end in self._runs:
            name = binding._engine.name
            seconds["denoiser" if name in PARTS else name] += end - start
        return dict(seconds)

    def _watched_steps(self) -> list[float]:
        """Return the seconds from the start of one denoiser run to the next, of one batch: between them lies a step."""
        starts = [start for binding, start, _ in self._runs if binding._engine.name == "denoiser"]
        return [after - before for before, after in pairwise(starts)]

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; see `worker.Contender`. Steps are told apart in the modes that have borders there."""
        pipe, borders = self._pipe, self._pipe.mode in ("eager", "step")
        self._runs.clear()
        events: list[Any] = []

        def progress(stage: str, done: int, total: int) -> None:
            if done == 1:  # the first step of a batch ends: what lies before is not a step alone
                events.clear()
            events.append(pipe.session.stream.record())

        watched = {"progress": progress} if borders and not self._on_cpu else {}
        start = time.perf_counter()
        result = self._generate(request, **watched)
        done = time.perf_counter()
        for picture in result.images:
            self._png(picture)
        end = time.perf_counter()
        self._last = request, [np.asarray(picture) for picture in result.images]
        timings = result.timings
        steps = [b.milliseconds_since(a) / 1e3 for a, b in pairwise(events)]
        if borders and self._on_cpu and request["batch"] <= pipe.max_batch:
            steps = self._watched_steps()
        return {
            "stages": {**{name: getattr(timings, name) for name in STAGES[:-1]}, "png": end - done},
            "steps": steps,
            "evaluations": timings.steps,
            "total": end - start,
            "networks": self._network_seconds(),
            "memory": result.memory,
        }

    def save(self, file: Path, *, latents: bool) -> None:
        """Write the last request's answer; the latents come from the same request once more."""
        request, pixels = self._last
        more = {"latents": self._generate(request, output_type="latent").images} if latents else {}
        np.savez(file, images=np.stack(pixels), **more)

    def _generate(self, request: dict[str, Any], **options: Any) -> Any:
        return self._pipe(
            request["prompt"],
            height=request["height"],
            width=request["width"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            num_images_per_prompt=request["batch"],
            seed=request["seed"],
            **self._lossy,
            **options,
        )
