"""The backends by name, which of them work here, and the choice for `auto`."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from .bundle import Bundle, GraphInfo
from .cuda.driver import has_driver, module_exists
from .device import Device
from .engine import Engine, Shapes
from .errors import BackendUnavailableError, RequestError
from .onnxruntime import cpu as onnxruntime_cpu
from .onnxruntime import cuda as onnxruntime_cuda
from .openvino import backend as openvino
from .options import describe
from .tensorrt import backend as tensorrt
from .tensorrt.library import MODULES


class Backend(Protocol):
    """Builds and opens engines on one device."""

    @property
    def name(self) -> str:
        """The name users give."""

    @property
    def device(self) -> Device:
        """Where its engines run."""

    @property
    def lock(self) -> threading.RLock:
        """Held while a request runs on it: its engines share the device's memory and stream."""

    @property
    def dynamic(self) -> bool:
        """Whether one engine serves every shape; otherwise `open` needs the shapes that the engine is for."""

    @property
    def compiles_shapes(self) -> bool:
        """Whether something is compiled, or captured, for every set of shapes that an engine is bound to."""

    @property
    def can_capture(self) -> bool:
        """Whether its engines' work can be captured into graphs."""

    def prepare(self, bundle: Bundle, shapes: Mapping[str, Shapes | Sequence[Shapes]], *, build: bool = True) -> None:
        """Build the engines that a request lacks, given the input shapes of its graphs, without opening any.

        Engines for several shapes of one graph share their weights where they can. Raises `MissingPlanError` where
        `build` is false or the backend builds none. A dynamic backend does nothing.
        """

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> Engine:
        """Open one graph of a bundle, building its engine first when the cache has none.

        `shapes` are the input shapes that the engine will be bound to; a dynamic backend ignores them. Engines are the
        caller's to close.
        """


_BACKENDS: dict[str, tuple[Callable[[], str | None], Callable[..., Backend]]] = {
    "tensorrt": (partial(tensorrt.unavailable_reason, "tensorrt"), partial(tensorrt.TensorRt, "tensorrt")),
    "tensorrt-rtx": (partial(tensorrt.unavailable_reason, "tensorrt-rtx"), partial(tensorrt.TensorRt, "tensorrt-rtx")),
    "onnxruntime-cuda": (onnxruntime_cuda.unavailable_reason, onnxruntime_cuda.OnnxRuntimeCuda),
    "onnxruntime-cpu": (onnxruntime_cpu.unavailable_reason, onnxruntime_cpu.OnnxRuntimeCpu),
    "openvino": (openvino.unavailable_reason, openvino.OpenVino),
}

_MODULES = {**MODULES, "onnxruntime-cuda": "onnxruntime", "onnxruntime-cpu": "onnxruntime", "openvino": "openvino"}

log = logging.getLogger(__name__)


def names() -> list[str]:
    """Return every backend name, in the order in which `auto` tries them."""
    return list(_BACKENDS)


def unavailable_reasons() -> dict[str, str | None]:
    """Return, for every backend, why it cannot run here, or None when it can."""
    return {name: reason() for name, (reason, _) in _BACKENDS.items()}


def factory(name: str) -> Callable[..., Backend]:
    """Return what opens a backend, by a name that `resolve` has returned."""
    return _BACKENDS[name][1]


def option_help(name: str) -> dict[str, tuple[str, Any, str]]:
    """Return the options of a backend that `--option` takes: the type in words, the default and the meaning of each.

    Raises `BackendUnavailableError` for an unknown name; the backend need not work here.
    """
    return describe(factory(resolve(name)))


def open_backend(name: str = "auto", **options: Any) -> Backend:
    """Open a backend by name; `auto` takes the first that works here.

    Raises `BackendUnavailableError` for an unknown name or one that cannot run on this machine, and `RequestError` for
    an option that the backend does not have.
    """
    name = resolve(name)
    known = inspect.signature(factory(name)).parameters
    for common in {"cache", "progress"} - set(known):  # a backend that builds nothing, or nothing that takes long
        options.pop(common, None)
    if unknown := [option for option in options if option not in known]:
        raise RequestError(f"backend {name} has no option {unknown[0]!r}: it has {', '.join(known)}")
    return factory(name)(**options)


def resolve(name: str = "auto") -> str:
    """Return a backend's name; `auto` gives the first that works here.

    `auto` warns of every backend that it passed over although its library and a driver are installed. Raises
    `BackendUnavailableError` for an unknown name, and for `auto` where none works.
    """
    if name == "auto":
        return _first_that_works()
    if name not in names():
        raise BackendUnavailableError(f"unknown backend {name!r}: choose auto, {', '.join(_BACKENDS)}")
    return name


def _first_that_works() -> str:
    reasons: dict[str, str] = {}
    for name, (unavailable_reason, _) in _BACKENDS.items():
        reason = unavailable_reason()
        if reason is None:
            if has_driver():
                for passed, why in reasons.items():
                    if module_exists(_MODULES[passed]):
                        log.warning("backend %s is passed over for %s: %s", passed, name, why)
            return name
        reasons[name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailableError(f"no backend works on this machine ({why})")
