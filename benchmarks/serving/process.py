"""A policy behind the real HTTP server, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ...engines.backends import Backend, open_backend
from ...engines.bundle import Bundle
from ...engines.errors import EngineError
from ...export.embedded import ensure_bundle
from ...runtime import Pipeline
from ...runtime.loop.widths import check_numbers
from ...runtime.sizes import parse_size
from ..contenders.process import resident_bytes
from .curve import curve
from .mixes import MOST_STEPS
from .paced import PacedBackend
from .servers import open_server
from .simulate import Policy, Setup

START_SECONDS = 120.0
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where a policy runs: on a paced device, or on a backend's engines; `curve` is that of either."""

    policy: Policy
    curve: str
    """Its name or its file."""
    paced: bool = True
    scale: float = 1.0
    slots: int = 16
    rows: int = 16
    queue: int = 32
    bundle: str | None = None
    """None: the embedded model."""
    backend: str = "auto"
    threads: int | None = None
    size: str = ""
    """Of pictures, WIDTHxHEIGHT; of no text the bundle's own."""

    def __post_init__(self) -> None:
        """Raise `RequestError` for numbers that no batcher takes, before a curve is measured."""
        check_numbers(self.slots, self.rows, self.queue, None)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height of pictures, None where they are the bundle's own; raises `RequestError` for no size."""
        return parse_size(self.size) if self.size else None

    @contextmanager
    def pipeline(self) -> Iterator[tuple[Pipeline, PacedBackend | None]]:
        """Open the pipeline, and close it after the block."""
        bundle = Bundle.open(self.bundle or ensure_bundle())
        options = {} if self.threads is None else {"threads": self.threads}
        paced = PacedBackend(self.setup.curve) if self.paced else None
        backend: Backend = paced or open_backend(self.backend, **options)
        with Pipeline(bundle, backend, max_batch=self.rows) as pipe:
            yield pipe, paced

    @property
    def setup(self) -> Setup:
        """The server's numbers."""
        return Setup(curve(self.curve).scaled(self.scale), self.slots, self.rows, self.queue)


class ServerProcess:
    """A policy behind HTTP; a context manager that ends it."""

    def __init__(self, place: Place) -> None:
        """Start it, and wait until it takes requests; raises `EngineError` when it does not."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", __name__, json.dumps(asdict(place)), str(self.port), str(os.getpid())]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.stats: dict[str, Any] = {}
        end = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise EngineError(f"the server of {place.policy} did not start: see what it wrote")
            time.sleep(0.05)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200)
        return False

    @property
    def resident_bytes(self) -> int:
        """Memory of the server's process."""
        return resident_bytes(self._process.pid)

    def close(self) -> None:
        """End the server, and take what it says at its end; calling it again does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            said, _ = self._process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise EngineError(f"the server did not end within {STOP_SECONDS:g} s of SIGTERM: it was killed") from None
        except ValueError:  # its output was taken before
            return
        if said.strip():
            self.stats = json.loads(said.splitlines()[-1])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM, and write a line of figures to standard output."""
    from ...runtime.server import HttpSettings, create_app
    from ...runtime.server.lifecycle import LifeSettings, serve
    from ...runtime.server.metrics import Metrics
    from ...runtime.service import Limits, Models, ModelSettings, Service

    place, port, parent = Place(**json.loads(arguments[0])), int(arguments[1]), int(arguments[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with place.pipeline() as (pipe, paced):
        http, metrics = HttpSettings(), Metrics()
        server = open_server(place.policy, pipe, place.setup, metrics.observer("model"), size=place.pixels)
        models = Models({"model": pipe.bundle}, ModelSettings())
        model = models.find(None)
        model.batcher, model.state = server, "ready"  # type: ignore[assignment]  # a baseline has what is called
        service = Service(models, Limits(steps=MOST_STEPS))
        before = paced.device.clock.spent if paced else 0.0
        try:
            serve(create_app(service, http, metrics), service, LifeSettings(port=port), http, metrics)
        finally:
            server.close(cancel=True)
    said = {"device_seconds": paced.device.clock.spent - before} if paced else {}
    with contextlib.suppress(BrokenPipeError):  # nobody reads it
        os.write(sys.stdout.fileno(), json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
