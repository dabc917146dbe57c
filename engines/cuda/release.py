"""Freeing what a GPU's work may still use: after that work, never during a capture, never by stopping the whole GPU.

Waiting for a context (`cuCtxSynchronize`) would wait for every pipeline of the process and break a capture that runs
meanwhile in any of its threads. So what is closed waits for events of its own device's streams alone, and while any
stream of the GPU captures it is kept and freed when the capture ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

from .driver import Driver

Free = Callable[[Driver], object]


class Owner(Protocol):
    """The device whose streams may still use what is freed."""

    def enter(self) -> Driver:
        """Make the GPU current and return the driver, also after the device was closed."""

    def mark(self) -> Callable[[], None]:
        """Record an event behind the work of each of its streams, and return what waits for these events."""


class Releases:
    """What is to be freed on one GPU, by all devices that this process has opened on it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver  # keeps the identity that the table below knows it by
        self.lock = threading.RLock()  # a finalizer may run inside any of its blocks
        """Held while streams are marked, and by who takes a stream away."""
        self._captures = 0
        self._waiting: list[tuple[Owner, Free]] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Free nothing inside the block, in which a stream captures; what was closed meanwhile is freed at its end."""
        with self.lock:
            self._captures += 1
        try:
            yield
        finally:
            with self.lock:
                self._captures -= 1
            self._drain()

    def add(self, owner: Owner, free: Free) -> None:
        """Call `free` once the work that the owner's streams hold now is done.

        That is before this returns, or at the end of the captures when a stream of the GPU captures.
        """
        with self.lock:
            self._waiting.append((owner, free))
        self._drain()

    def _drain(self) -> None:
        with self.lock:  # no capture can begin between the look and the marks: an event would become a part of it
            if self._captures or not self._waiting:
                return
            due, self._waiting = self._waiting, []
            try:
                waits = [owner.mark() for owner in dict.fromkeys(owner for owner, _ in due)]
            except BaseException:
                self._waiting[:0] = due
                raise
        try:
            for wait in waits:
                wait()
        except BaseException:
            with self.lock:
                self._waiting[:0] = due
            raise
        with self.lock:
            if self._captures:  # one began while this thread waited
                self._waiting[:0] = due
                return
            self._free(due)

    def _free(self, due: list[tuple[Owner, Free]]) -> None:
        """Free all of it, also when one fails; then raise the first failure."""
        failure: Exception | None = None
        for owner, free in due:
            try:
                free(owner.enter())
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


_releases: WeakValueDictionary[tuple[int, int], Releases] = WeakValueDictionary()
_lock = threading.Lock()


def releases_of(driver: Driver, number: int) -> Releases:
    """Return what all devices on one GPU of one driver share."""
    with _lock:
        key = (driver.identity, number)
        shared = _releases.get(key)
        if shared is None:
            shared = _releases[key] = Releases(driver)
        return shared
