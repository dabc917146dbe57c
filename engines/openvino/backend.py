"""OpenVINO as a backend: graphs compiled once for this processor, kept in the engine cache, memory-mapped at open.

In the cache a graph is kept once as OpenVINO writes it, and beside it compiled models, which read their weights from
there: one for each shape that was used, as fixed shapes run a quarter faster, and one for all others. Compiling a
full-size U-Net takes a copy of its weights and many seconds; a model from the cache maps them.
"""

from __future__ import annotations

import json
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
from ..cache import SIDECAR, EngineCache
from ..engine import Shapes
from ..errors import BackendUnavailableError, EngineError, RequestError, reason
from ..host import HostDevice
from ..machine import processor_identity
from ..onnx_graph import graph_files
from ..options import Threads, threads_of
from ..selfcheck import Place, accept, out_of_memory
from .angles import angles_of
from .engine import OpenVinoEngine
from .format import write_model
from .library import load_openvino
from .models import CompiledModels
from .pages import letting_go_of_pages

BUILDER = 2
"""Raised when what `_build` does to a graph changes, so that engines built before are not reused."""

Inside = Literal["f32", "bf16", "f16"]
PRECISIONS: Mapping[str, Precision] = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
DEVICES = ("CPU", "GPU")
FIXED_BYTES, FEWEST, MOST = 1 << 30, 2, 16
"""Bytes of weights that a graph's models for fixed shapes may hold, as each has its own; and how many there are in any
case: requests with guidance and without it, or the last batch of a request."""

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
        shapes: Annotated[
            Literal["fixed", "any"],
            "whether a model is compiled for each size and batch in use, which is faster, or one for all of them",
        ] = "fixed",
    ) -> None:
        """Open a device; raises `BackendUnavailableError` where OpenVINO has none, `RequestError` for bad options."""
        self.threads = threads_of(threads)
        if precision not in PRECISIONS:
            raise RequestError(f"precision is {precision!r}: choose {', '.join(PRECISIONS)}")
        if device not in DEVICES:
            raise RequestError(f"device is {device!r}: choose {' or '.join(DEVICES)}")
        if shapes not in ("fixed", "any"):
            raise RequestError(f"shapes is {shapes!r}: choose fixed or any")
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
        self._precision, self._on, self.compiles_shapes = precision, device, shapes == "fixed"
        self._cache = cache or EngineCache()

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Build nothing: one engine serves every shape."""

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> OpenVinoEngine:
        """Open one graph of a bundle, whose models are compiled and checked when they are first bound.

        Given shapes, or where there is one model for all of them, this is done here.
        """
        weights = self._weights(bundle, graph)
        nbytes = weights.stat().st_size
        most = max(FEWEST, min(MOST, FIXED_BYTES // max(1, nbytes))) if self.compiles_shapes else 0
        models = CompiledModels(most, lambda wanted: self._checked(bundle, graph, wanted))
        if shapes or not self.compiles_shapes:
            models.take(shapes or {})
        return OpenVinoEngine(graph, models, nbytes)

    def find(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes) -> Path | None:
        """Return the folder of the compiled model for input shapes in the cache, or None where it has none."""
        return self._cache.find(graph.name, self.key(bundle, graph, shapes if self.compiles_shapes else None))

    def _weights(self, bundle: Bundle, graph: GraphInfo) -> Path:
        """Return the file of a graph's weights as OpenVINO writes them, in the cache."""
        key = {
            "backend": self.name,
            "builder": BUILDER,
            "graph": bundle.digest(graph),
            "openvino": load_openvino().__version__,
            "weights": "bf16" if self._inside(graph) == "bf16" else "as exported",
        }
        return self._cache.get(graph.name, key, lambda out: self._translate(bundle, graph, out)) / "model.bin"

    def _checked(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None) -> Any:
        """Return a model for shapes from the cache, compiling it when the cache has none, and check a new one."""
        key = self.key(bundle, graph, shapes)

        def build(out: Path) -> dict[str, Any]:
            return self._compile(self._weights(bundle, graph).parent, graph, shapes, out)

        folder, compiled = self._cache.load(
            lambda: self._cache.get(graph.name, key, build),
            lambda found: self._imported(found, self._weights(bundle, graph), graph),
            lambda: out_of_memory(self.name, f"engine {graph.name} was loaded"),
            "install another version of openvino, and report it",
        )
        engine = OpenVinoEngine(graph, CompiledModels(MOST, lambda _: compiled))
        with self.lock:
            place = Place(
                self.name,
                self.device,
                {"device": self._place()},
                folder,
                ranges=(shapes, shapes) if shapes else None,
                computes=PRECISIONS[self._inside(graph)],
            )
            accept(engine, bundle, graph, place)
        return compiled

    def key(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> dict[str, Any]:
        """Return everything that changes a compiled model of this backend."""
        sidecar = json.loads((self._weights(bundle, graph).parent / SIDECAR).read_text(encoding="utf-8"))
        return {
            "backend": self.name,
            "builder": BUILDER,
            "graph": bundle.digest(graph),
            "weights": sidecar["files"]["model.bin"]["sha256"],
            "openvino": load_openvino().__version__,
            "cpu": processor_identity(),
            "device": self._place(),
            "precision": self._inside(graph),
            "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
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

    def _translate(self, bundle: Bundle, graph: GraphInfo, out: Path) -> dict[str, Any]:
        """Write a graph in OpenVINO's own format, its weights in a file that all its models read."""
        files = graph_files(bundle, graph, "openvino")
        log.info("building %s for %s", graph.name, self.name)
        try:
            with letting_go_of_pages(*files, out):
                model = self._read(files, out)
                write_model(model, out, angles_of(model), bf16=self._inside(graph) == "bf16")
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"graph {graph.name} cannot be built for {self.name}: {reason(error)}") from error
        there = {name for port in (*model.inputs, *model.outputs) for name in port.names}
        if missing := [spec.name for spec in graph.inputs + graph.outputs if spec.name not in there]:
            raise EngineError(f"graph {graph.name} has no tensor {missing[0]!r}, and the manifest says that it has")
        return {"tensors": [t.model_dump() for t in graph.inputs + graph.outputs]}

    def _compile(self, folder: Path, graph: GraphInfo, shapes: Shapes | None, out: Path) -> dict[str, Any]:
        log.info("compiling %s for %s", graph.name, self.name)
        try:
            model = self._core.read_model(folder / "model.xml")
            if shapes:
                model.reshape({name: list(shape) for name, shape in shapes.items()})
            with letting_go_of_pages(folder / "model.bin"):
                compiled = self._core.compile_model(
                    model, self._on, {**self._settings(graph), "CACHE_MODE": "OPTIMIZE_SIZE"}
                )
                stream = compiled.export_model()
            (out / "compiled.blob").write_bytes(stream.getbuffer())
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"graph {graph.name} cannot be compiled for {self.name}: {reason(error)}") from error
        return {}

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

    def _imported(self, folder: Path, weights: Path, graph: GraphInfo) -> Any:
        settings = self._settings(graph) | {"ENABLE_WEIGHTLESS": True, "WEIGHTS_PATH": str(weights)}
        try:
            stored = load_openvino().Tensor(np.fromfile(folder / "compiled.blob", np.uint8))
            with letting_go_of_pages(weights):
                return self._core.import_model(stored, self._on, settings)
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise EngineError(f"engine {folder} cannot be loaded ({reason(error)})") from error


def _updates_latents(graph: GraphInfo) -> bool:
    """Whether a graph comes from no network: a few small element-wise nodes, after each step."""
    return graph.stage == "step" and graph.parity is None
