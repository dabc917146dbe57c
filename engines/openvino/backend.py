"""OpenVINO as a backend: graphs compiled once for this processor, kept in the engine cache, memory-mapped at open.

An engine is the graph's weights as OpenVINO writes them and a compiled model that reads them from there. Compiling a
full-size U-Net takes a copy of its weights and tens of seconds; an engine from the cache maps them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ..bundle import Bundle, GraphInfo, Precision
from ..cache import EngineCache
from ..engine import Shapes
from ..errors import BackendUnavailableError, EngineError, RequestError, reason
from ..host import HostDevice
from ..machine import processor_identity
from ..onnx_graph import graph_files
from ..options import Threads, threads_of
from ..selfcheck import Place, accept, out_of_memory
from .engine import OpenVinoEngine
from .library import load_openvino

BUILDER = 1
"""Raised when what `_build` does to a graph changes, so that engines built before are not reused."""

Inside = Literal["f32", "bf16", "f16"]
PRECISIONS: Mapping[str, Precision] = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
DEVICES = ("CPU", "GPU")

log = logging.getLogger(__name__)


def unavailable_reason() -> str | None:
    """Return why this backend cannot run here, or None when it can."""
    try:
        load_openvino()
    except ImportError:
        return "openvino is not installed: run `pip install 'latentrt[openvino]'`"
    return None


class OpenVino:
    """Opens bundle graphs with OpenVINO, on the processor or on an Intel GPU."""

    name = "openvino"
    dynamic = True
    can_capture = True

    def __init__(
        self,
        *,
        cache: EngineCache | None = None,
        threads: Threads = None,
        precision: Annotated[
            Inside, "what networks compute in, whatever the bundle's precision; the sampler's update stays in f32"
        ] = "f32",
        device: Annotated[Literal["CPU", "GPU"], "the processor, or one of Intel's GPUs"] = "CPU",
    ) -> None:
        """Open a device; raises `BackendUnavailableError` where OpenVINO has none, `RequestError` for bad options."""
        self.threads = threads_of(threads)
        if precision not in PRECISIONS:
            raise RequestError(f"precision is {precision!r}: choose {', '.join(PRECISIONS)}")
        if device not in DEVICES:
            raise RequestError(f"device is {device!r}: choose {' or '.join(DEVICES)}")
        if threads is not None and device != "CPU":
            raise RequestError(
                f"threads is {threads} and device is {device!r}: threads are the processor's, leave it out"
            )
        if problem := unavailable_reason():
            raise BackendUnavailableError(f"backend {self.name}: {problem}")
        self._core = load_openvino().Core()
        if not any(known.partition(".")[0] == device for known in self._core.available_devices):
            raise BackendUnavailableError(
                f"backend {self.name} finds no {device} here: it has {', '.join(self._core.available_devices)}"
            )
        capabilities = self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        if precision != "f32" and PRECISIONS[precision].upper() not in capabilities:
            raise RequestError(
                f"precision is {precision!r}, which this {device} does not compute in: it has {', '.join(capabilities)}"
            )
        self.device = HostDevice()
        self.lock = threading.RLock()
        self._precision, self._on = precision, device
        self._cache = cache or EngineCache()

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes]) -> None:
        """Build nothing: one engine serves every shape."""

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OpenVinoEngine:
        """Open one graph of a bundle, building its engine first when the cache has none, and check a new engine."""
        folder, compiled = self._cache.load(
            lambda: self._cache.get(graph.name, self.key(bundle, graph), lambda out: self._build(bundle, graph, out)),
            lambda found: self._compiled(found, graph),
            lambda: out_of_memory(self.name, f"engine {graph.name} was loaded"),
            "install another version of openvino, and report it",
        )
        engine = OpenVinoEngine(graph, compiled)
        with self.lock:
            computes = PRECISIONS[self._inside(graph)]
            place = {"device": self._place()}
            accept(engine, bundle, graph, Place(self.name, self.device, place, folder, computes=computes))
        return engine

    def key(self, bundle: Bundle, graph: GraphInfo) -> dict[str, Any]:
        """Return everything that changes an engine of this backend."""
        return {
            "backend": self.name,
            "builder": BUILDER,
            "graph": bundle.digest(graph),
            "openvino": load_openvino().__version__,
            "cpu": processor_identity(),
            "device": self._place(),
            "precision": self._inside(graph),
        }

    def _place(self) -> str:
        """Return the device's name, and the driver's version where it has one."""
        known = [self._core.get_property(self._on, "FULL_DEVICE_NAME")]
        if self._on != "CPU":
            with suppress(RuntimeError):  # devices without one
                known.append(self._core.get_property(self._on, "GPU_DRIVER_VERSION"))
        return " ".join(map(str, known))

    def _inside(self, graph: GraphInfo) -> Inside:
        """Return what a graph is computed in: the one that updates latents stays exact."""
        return "f32" if _updates_latents(graph) else self._precision

    def _build(self, bundle: Bundle, graph: GraphInfo, out: Path) -> dict[str, Any]:
        files = graph_files(bundle, graph, "openvino")
        log.info("building %s for %s", graph.name, self.name)
        written, compiled = out / "model.xml", out / "compiled.blob"
        try:
            load_openvino().serialize(self._read(files, out), written, out / "model.bin")
            model = self._core.read_model(written)
            stream = self._core.compile_model(
                model, self._on, {**self._settings(graph), "CACHE_MODE": "OPTIMIZE_SIZE"}
            ).export_model()
            compiled.write_bytes(stream.getbuffer())
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"graph {graph.name} cannot be built for {self.name}: {reason(error)}") from error
        written.unlink()  # the compiled model has all of it but the weights
        return {"tensors": [t.model_dump() for t in graph.inputs + graph.outputs]}

    def _read(self, files: Sequence[Path], folder: Path) -> Any:
        """Return the model of a graph's files; `folder` is for those that are links, which OpenVINO does not follow."""
        if not any(file.is_symlink() for file in files):
            return self._parsed(files[0])
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            for file in files:
                place = Path(beside) / file.name
                try:
                    os.link(file.resolve(), place)
                except OSError:  # on another file system, or somebody else's
                    shutil.copyfile(file, place)
            return self._parsed(Path(beside) / files[0].name)

    def _parsed(self, file: Path) -> Any:
        """Return the model of an ONNX file.

        `Core.read_model` would look at the content, and take another format's weights from files that nobody listed.
        """
        reader = load_openvino().frontend.FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(str(file)))

    def _settings(self, graph: GraphInfo) -> dict[str, Any]:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self._inside(graph)}
        if self._on == "CPU":
            settings |= {
                "INFERENCE_NUM_THREADS": 1 if _updates_latents(graph) else self.threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,
            }
        return settings

    def _compiled(self, folder: Path, graph: GraphInfo) -> Any:
        settings = self._settings(graph) | {"ENABLE_WEIGHTLESS": True, "WEIGHTS_PATH": str(folder / "model.bin")}
        try:
            stored = load_openvino().Tensor(np.fromfile(folder / "compiled.blob", np.uint8))
            return self._core.import_model(stored, self._on, settings)
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"engine {folder} cannot be loaded ({reason(error)})") from error


def _updates_latents(graph: GraphInfo) -> bool:
    """Whether a graph comes from no network: a few small element-wise nodes, after each step."""
    return graph.stage == "step" and graph.parity is None
