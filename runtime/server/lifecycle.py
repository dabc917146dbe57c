"""From the first moment to the last: bind, load, serve, drain, exit; and the watchdog that ends what hangs."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from ...engines.errors import EngineError, LatentRTError, RequestError
from ..service import Service
from ..service.errors import UnavailableError
from ..service.work import check_timer
from .guard import protocol_of, watch_connections
from .metrics import Metrics
from .settings import HttpSettings

FLUSH_SECONDS = 10.0
"""Within which answers must have been sent once all work is done."""
CLOSE_SECONDS = 10.0
"""Within which engines must have been closed, a bundle that is being opened included: then the process just ends."""
LOOK_SECONDS = 0.5
"""How often the watchdog looks."""
HUNG = 70
"""The exit code of a process whose device hangs; the system's own for a software error."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LifeSettings:
    """Where a server listens, and when it ends."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_timeout: float = 60.0
    """Seconds that unfinished work has after SIGTERM."""
    step_timeout: float = 120.0
    """Seconds after which a step hangs, and the process with it."""
    max_failures: int = 3
    """Failures of an engine in a row after which the process ends, to be started again."""

    def __post_init__(self) -> None:
        """Raise `RequestError` for times that no timer takes, and for ends at once."""
        check_timer("drain_timeout", self.drain_timeout, zero=True)
        check_timer("step_timeout", self.step_timeout)
        if self.max_failures < 1:
            raise RequestError(f"max_failures is {self.max_failures}: give 1 or more")


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises `RequestError` when that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"--port {port} on --host {host} cannot be listened to ({why}): choose another") from error
    listener.set_inheritable(False)
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, which on the first signal lets all work finish, and on the second goes at once."""

    def __init__(
        self, config: uvicorn.Config, service: Service, settings: LifeSettings, http: HttpSettings, metrics: Metrics
    ) -> None:
        """Serve a service, which is opened on a thread while `ready` answers 503."""
        super().__init__(config)
        self.service, self.settings, self._http, self._metrics = service, settings, http, metrics
        self._watch: asyncio.Task[None] | None = None
        self.error: BaseException | None = None
        """Why the process ends with an error, or None."""
        self.interrupted = False
        self._draining, self._signals = False, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal: what it interrupts may hold any lock, so `on_tick` does the rest."""
        self._signals += 1
        self.interrupted = self.interrupted or sig == signal.SIGINT
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Drain after the first signal; called ten times a second."""
        if self._signals and not self._draining:
            self.drain()
        return await super().on_tick(counter)

    def drain(self) -> None:
        """Take nothing more, and end once all work is done or its time is up; returns at once."""
        self._draining = True
        self.service.state = "draining" if self.service.state != "failed" else "failed"
        threading.Thread(target=self._drain, name="latentrt drain", daemon=True).start()

    def _drain(self) -> None:
        try:
            log.info("draining: %d requests are not done", len(self.service.unfinished))
            if not self.service.drain(self.settings.drain_timeout):
                log.warning("some requests were not done in %g s, and were dropped", self.settings.drain_timeout)
        finally:
            self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals here, and raise none of them again: a drained server exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer from now on, and load."""
        await super().startup(sockets)
        watch = watch_connections(self.server_state.connections, self._http, self._metrics)
        self._watch = asyncio.get_running_loop().create_task(watch)
        threading.Thread(target=self._load, name="latentrt load", daemon=True).start()

    def _load(self) -> None:
        try:
            self.service.open()
            names = ", ".join(self.service.models.names)
            log.info("serving %s on %s", names, self.address)
        except BaseException as error:
            if not self._draining:  # it was told to end while it was loading
                self.fail(error)

    @property
    def address(self) -> str:
        """The URL of the server."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.error = self.error or error
        self.service.state = "failed"
        self.drain()


class Watchdog:
    """Ends the process when a step hangs, and the service when its engines keep failing."""

    def __init__(self, server: Server) -> None:
        """Start looking, on a thread."""
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentrt watchdog", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        service, settings = self._server.service, self._server.settings
        while not self._stop.wait(LOOK_SECONDS):
            # A step that hangs with Python's lock held stops this thread as well: then a timer of the system's ends it.
            with contextlib.suppress(RuntimeError, AttributeError, OSError, ValueError):  # no standard error
                faulthandler.dump_traceback_later(settings.step_timeout + 60, exit=True)
            for model in service.models:
                batcher = model.batcher
                if batcher is None:
                    continue
                if (batcher.stuck_seconds or 0.0) > settings.step_timeout:
                    self._end(f"a step of model {model.name} has hung for {batcher.stuck_seconds:.0f} s")
                if batcher.failures_in_a_row >= settings.max_failures and service.state == "ready":
                    log.critical("%d steps of model %s failed in a row: ending", settings.max_failures, model.name)
                    self._server.fail(EngineError(f"steps of model {model.name} keep failing: start again"))

    def _end(self, what: str) -> None:
        """End the process, which a hung engine may not let go in any other way; clients get their answers first."""
        log.critical("%s: ending the process", what)
        self._server.service.fail(UnavailableError("the device hangs: try later", "failed", 10.0))
        time.sleep(1.0)
        logging.shutdown()
        os._exit(HUNG)

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()


def _close(service: Service, server: Server) -> None:
    """Close a service, or end the process when that takes too long."""
    thread = threading.Thread(target=service.close, name="latentrt close", daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)
    if thread.is_alive():
        log.warning("engines were not closed in %g s: ending all the same", CLOSE_SECONDS)
        logging.shutdown()
        os._exit(0 if server.error is None else 1)


def serve(app: Any, service: Service, settings: LifeSettings, http: HttpSettings, metrics: Metrics) -> bool:
    """Serve until a signal ends it, and tell whether that was an interrupt of the keyboard.

    Raises `RequestError` when the address is taken, and what ended the server otherwise.
    """
    listener = bound(settings.host, settings.port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=protocol_of(http, metrics.answered),
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=int(FLUSH_SECONDS),
    )
    server = Server(config, service, settings, http, metrics)
    watchdog = Watchdog(server)
    try:
        server.run(sockets=[listener])
    finally:
        watchdog.close()
        listener.close()
        _close(service, server)
    if server.error is not None:
        if isinstance(server.error, (LatentRTError, MemoryError)):
            raise server.error
        raise EngineError(f"the server failed: {server.error}") from server.error
    return server.interrupted
