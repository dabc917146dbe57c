"""Bundles by name: each opened in a batcher of its own when it is first asked for, the longest idle closed for room."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from ...engines.bundle import Bundle
from ...engines.bundle.manifest import MANIFEST
from ...engines.errors import RequestError
from ..batcher import Batcher
from ..batcher.queue import MAX_POOLS
from ..loop.widths import SLOTS
from ..sizes import check_size
from .counts import Figures, ServiceObserver, counts_of, figures_of, memory_of, summed
from .errors import BusyError, NotFoundError
from .work import Size

BUSY_SECONDS = 10.0
"""When to try again for a model that has no room now."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSettings:
    """How bundles are opened: those of `Batcher` and `Pipeline.open`, and the sizes that are served."""

    backend: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    slots: int = SLOTS
    rows: int | None = None
    fixed_rows: bool = False
    max_waiting: int = 64
    max_wait: float | None = None
    sizes: tuple[Size, ...] = ()
    """Warmed up when a bundle is opened; none: its default size."""
    sizes_only: bool = False
    """Whether other sizes are refused also where the backend could open them."""
    most_pixels: int | None = None
    """Of a picture of another size; None: four times those of the largest."""

    def __post_init__(self) -> None:
        """Raise `RequestError` for what no batcher takes."""
        if self.max_wait is not None and not self.max_wait > 0:
            raise RequestError(f"max_wait is {self.max_wait:g}: give seconds, more than 0, or leave it out")
        if self.rows is not None and self.rows < max(2, self.slots):
            raise RequestError(f"rows is {self.rows}: {self.slots} slots need {max(2, self.slots)} or more")


class Model:
    """A bundle by its name, open or not."""

    def __init__(self, name: str, bundle: Bundle, settings: ModelSettings) -> None:
        """Open nothing yet; raises `RequestError` for sizes that the bundle cannot draw."""
        self.name, self.bundle, self.manifest = name, bundle, bundle.manifest
        file = bundle.path / MANIFEST
        self.digest, self.created = hashlib.sha256(file.read_bytes()).hexdigest(), int(file.stat().st_mtime)
        latent = self.manifest.latent
        self.sizes: tuple[Size, ...] = settings.sizes or ((latent.default_width, latent.default_height),)
        for size in self.sizes:
            check_size(*size, latent)
        largest = max(width * height for width, height in self.sizes)
        self.most_pixels = settings.most_pixels or max(4 * largest, latent.default_width * latent.default_height)
        """Of a picture: attention over many more would fill the memory, for one request or for all."""
        self.state: Literal["cold", "loading", "ready", "failed"] = "cold"
        self.batcher: Batcher | None = None
        self.sizes_only = settings.sizes_only
        self.counted: dict[str, float] = {}
        """What batchers of this model had counted when they were closed."""
        self._closing: list[Batcher] = []
        """Batchers that were taken, and are not in `counted` yet."""
        self._counting = threading.Lock()
        """Of the batchers and of `counted`: each count is seen once at any moment."""
        self.unfinished = 0
        """Jobs that have not ended: a model with one stays open."""
        self.used = time.monotonic()
        self.load_seconds: float | None = None
        self.nbytes = sum(info.size for name, info in self.manifest.files.items() if _is_loaded(name))
        """Bytes that it is reckoned to take: of its files, and from when it was opened of the device's memory."""

    @property
    def allowed(self) -> tuple[Size, ...] | None:
        """The only sizes that are drawn; None: any that the bundle can. Known for certain once it is open."""
        dynamic = self.batcher is None or self.batcher.pipe.backend.dynamic
        return self.sizes if self.sizes_only or not dynamic else None

    @property
    def figures(self) -> Figures:
        """What its batcher is at, and what it and those before it have counted."""
        with self._counting:
            closing = (counts_of(batcher.stats()) for batcher in self._closing)
            return figures_of(self.batcher, summed(self.counted, *closing))

    def open(self, settings: ModelSettings, **named: Any) -> None:
        """Open the batcher and warm it up for every size; raises as `Batcher` does."""
        began = time.perf_counter()
        batcher = Batcher(
            self.bundle,
            slots=settings.slots,
            rows=settings.rows,
            fixed_rows=settings.fixed_rows,
            max_waiting=settings.max_waiting,
            max_wait=settings.max_wait,
            build=False,
            backend=settings.backend,
            **settings.options,
            **named,
        )
        try:
            if not batcher.pipe.backend.dynamic and len(self.sizes) > MAX_POOLS:
                raise RequestError(f"{len(self.sizes)} sizes are given: backend {settings.backend} holds {MAX_POOLS}")
            batcher.warm_up(self.sizes)
        except BaseException:
            batcher.close(cancel=True)
            raise
        self.batcher, self.state, self.used = batcher, "ready", time.monotonic()
        self.load_seconds = time.perf_counter() - began
        # more than was taken where others had left memory behind
        self.nbytes = max(batcher.pipe.session.bytes_taken, sum(each.total() for each in memory_of(batcher).values()))

    def taken(self) -> Batcher | None:
        """Return the batcher, which is to be closed, and have none from now on."""
        with self._counting:
            batcher, self.batcher, self.state = self.batcher, None, "cold"
            if batcher is not None:
                self._closing.append(batcher)
        return batcher

    def close(self, batcher: Batcher | None, *, cancel: bool = False) -> None:
        """Close a batcher that was taken, and remember what it counted; others are closed whatever this one raises."""
        if batcher is None:
            return
        try:
            batcher.close(cancel=cancel)
        except Exception as error:  # of a device that is lost
            log.warning("bundle %s was not closed whole: %s", self.name, str(error))
        finally:
            with self._counting:
                self._closing.remove(batcher)
                self.counted = summed(self.counted, counts_of(batcher.stats()))


def _is_loaded(name: str) -> bool:
    return not name.startswith("references/")


class Models:
    """The bundles of a server, within a budget of bytes of those that are open at one time.

    Bundles are opened one at a time on a thread of their own, beside the steps of those that are open.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        settings: ModelSettings,
        *,
        budget: int | None = None,
        aliases: Mapping[str, str] | None = None,
        observer: ServiceObserver | None = None,
    ) -> None:
        """Open nothing yet.

        Raises `RequestError` for no bundle, an alias of none or that hides one, and a bundle larger than the budget.
        """
        if not bundles:
            raise RequestError("no bundle is given: name one")
        self._settings, self.observer, self.budget = settings, observer or ServiceObserver(), budget
        self.max_waiting = settings.max_waiting
        """Images that may wait for a bundle to be opened, as many as then for a slot."""
        self._models = {name: Model(name, bundle, settings) for name, bundle in bundles.items()}
        self._aliases = dict(aliases or {})
        for alias, name in self._aliases.items():
            if name not in self._models:
                raise RequestError(f"alias {alias}={name} is of no bundle: there are {', '.join(self._models)}")
            if alias in self._models and alias != name:
                raise RequestError(f"alias {alias}={name} hides bundle {alias}: choose a name that no bundle has")
        for model in self._models.values():
            if budget is not None and model.nbytes > budget:
                raise RequestError(
                    f"bundle {model.name} has {model.nbytes / 2**30:.1f} GiB, more than all may have: "
                    f"{budget / 2**30:.1f} GiB"
                )
        self._lock = threading.Lock()
        self._opening: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, "latentrt loader")

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def names(self) -> Sequence[str]:
        """The names of all bundles, the default one first."""
        return tuple(self._models)

    def find(self, name: str | None) -> Model:
        """Return a model by its name or an alias, the first one for None; raises `NotFoundError`."""
        if name is None:
            return next(iter(self._models.values()))
        found = self._models.get(self._aliases.get(name, name))
        if found is None:
            names = ", ".join([*self._models, *self._aliases])
            raise NotFoundError(f"model {name[:60]!r} is not served here: choose {names}", "model", "model_not_found")
        return found

    def hold(self, model: Model) -> None:
        """Count a job of a model: it stays open until `let_go`."""
        with self._lock:
            model.unfinished += 1
            model.used = time.monotonic()

    def let_go(self, model: Model) -> None:
        """Count the end of a job."""
        with self._lock:
            model.unfinished -= 1
            model.used = time.monotonic()

    def opened(self, model: Model) -> Future[None]:
        """Return a future of a model being open; it fails with what opening raised, and with `BusyError`."""
        with self._lock:
            if model.state == "ready":
                done: Future[None] = Future()
                done.set_result(None)
                return done
            if model.name not in self._opening:
                model.state = "loading"
                self._opening[model.name] = self._thread.submit(self._open, model)
            return self._opening[model.name]

    @property
    def open_bytes(self) -> int:
        """Bytes that all open models take."""
        return sum(model.nbytes for model in self._models.values() if model.state == "ready")

    def _open(self, model: Model) -> None:
        try:
            if not self._make_room(model):
                raise BusyError(
                    f"model {model.name} is not open, and the others have work: try later",
                    "model_not_loaded",
                    BUSY_SECONDS,
                )
            log.info("opening bundle %s", model.name)
            model.open(self._settings, observer=self.observer.observer(model.name))
            self.observer.loaded(model.name, model.load_seconds)
            log.info("bundle %s is open after %.1f s, %.2f GiB", model.name, model.load_seconds, model.nbytes / 2**30)
            self._make_room(model)  # for what it takes in fact
        except BusyError:
            model.state = "cold"
            raise
        except BaseException:
            model.state = "failed"
            self.observer.loaded(model.name, None)
            raise
        finally:
            with self._lock:
                del self._opening[model.name]

    def _make_room(self, wanted: Model) -> bool:
        """Close other models without work, the longest idle first, until `wanted` fits beside the rest; tell whether.

        Nothing is closed for one that would not fit all the same, unless it is open already. One that takes more than
        the budget, as it turned out when it was opened, is open alone.
        """
        if self.budget is None:
            return True
        with self._lock:
            others = [model for model in self._models.values() if model.state == "ready" and model is not wanted]
            idle = sorted((model for model in others if not model.unfinished), key=lambda model: model.used)
            excess = sum(model.nbytes for model in others) + wanted.nbytes - self.budget
            fits = len(idle) == len(others) or excess <= sum(model.nbytes for model in idle)
            if not fits and wanted.state != "ready":
                return False
            closing = []
            while idle and excess > 0:
                oldest = idle.pop(0)
                excess -= oldest.nbytes
                closing.append((oldest, oldest.taken()))
        for model, batcher in closing:
            log.info("closing bundle %s to make room for %s", model.name, wanted.name)
            model.close(batcher)
        return True

    def close(self, *, cancel: bool = False) -> None:
        """Close all models, after their work or with `cancel` without it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for model in self._models.values():
            model.close(model.taken(), cancel=cancel)
