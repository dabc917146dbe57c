"""Threads beside the loop that do for each request one thing after the other: events, pictures, results."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

MOST = 64
"""Threads at most: one that a listener holds up is replaced, so that requests do not wait for listeners of others."""
PATIENCE = 5.0
"""Seconds for which a thread beyond the first waits for more to do."""
RETRY = 1.0
"""Seconds after which it is tried again to start a first thread, when there were too many of others."""

log = logging.getLogger(__name__)


class Box:
    """What is to be done for one request, in order. Something new under a key takes the place of what was there."""

    def __init__(self) -> None:
        """Nothing is to be done yet."""
        self.entries: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self.queued = False


class Deliverer:
    """The threads. What is to be done may raise and may take long: it harms no other request."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._changed = threading.Condition()
        self._ready: deque[Box] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle, self._closing, self._complained = 0, False, False

    def post(self, box: Box, key: Hashable, work: Callable[[], None]) -> None:
        """Let `work` be done for a request, after what is there; of one key only the last is kept. Never waits."""
        with self._changed:
            box.entries.pop(key, None)
            box.entries[key] = work
            if not box.queued:
                box.queued = True
                self._ready.append(box)
                self._start()
                self._changed.notify()

    def retry(self) -> float | None:
        """Start a thread where none could be, and return after how many seconds to try again, None for never."""
        with self._changed:
            if self._ready and not self._threads:
                self._start()
            return RETRY if self._ready and not self._threads else None

    def _start(self) -> None:
        """Start a thread where more is ready than threads wait for."""
        if len(self._ready) <= self._idle or len(self._threads) >= MOST:
            return
        thread = threading.Thread(target=self._run, name="latentrt finisher", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there are too many, or the interpreter ends
            if not self._complained:
                log.warning("a thread for results did not start: %s", error)
            self._complained = True
        else:
            self._threads.add(thread)
            self._complained = False

    def owns(self, thread: threading.Thread) -> bool:
        """Tell whether a thread is one of these."""
        with self._changed:
            return thread in self._threads

    def close(self, timeout: float | None = None) -> None:
        """End the threads when everything is done, or leave those behind that are not done in time.

        What no thread could be started for is done here.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout)
        if timeout is None:
            self._run()

    def _run(self) -> None:
        while (box := self._next()) is not None:
            while (work := self._work_of(box)) is not None:
                try:
                    work()
                except BaseException:  # of a callback that ends its thread
                    log.exception("a callback of a request failed")

    def _next(self) -> Box | None:
        """Return a box that has something to do, or None for the thread to end."""
        with self._changed:
            self._idle += 1
            while not self._ready and not self._closing:
                if not self._changed.wait(PATIENCE) and not self._ready and len(self._threads) > 1:
                    break
            self._idle -= 1
            if self._ready:
                return self._ready.popleft()
            self._threads.discard(threading.current_thread())
            return None

    def _work_of(self, box: Box) -> Callable[[], None] | None:
        with self._changed:
            if box.entries:
                return box.entries.popitem(last=False)[1]
            box.queued = False
            return None
