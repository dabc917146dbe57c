"""Pages of mapped files: a model that packs its weights needs those of the file no longer."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PAGEOUT = 21
"""Takes pages away and loses nothing: what was mapped there may by then be something else."""
EVERY = 0.05
"""Seconds after which pages that were read meanwhile are let go of."""


@contextmanager
def letting_go_of_pages(*places: Path) -> Iterator[None]:
    """Let the system take pages back of files that are mapped meanwhile, and of which a model keeps a copy.

    `places` are files, or folders of them. What is read once more is read from its file. Without this a process holds
    its weights twice; on Linux alone.
    """
    over = threading.Event()

    def keep_few() -> None:
        while not over.wait(EVERY):
            _let_go_of_pages(places)

    thread = threading.Thread(target=keep_few, name="latentrt-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _let_go_of_pages(places)


def _let_go_of_pages(places: Sequence[Path]) -> None:
    with suppress(OSError, AttributeError):
        libc, wanted = ctypes.CDLL(None, use_errno=True), [place.resolve() for place in places]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, access, *_, name = line.split(maxsplit=5)
            if "w" not in access and any(Path(name).is_relative_to(place) for place in wanted):
                start, end = (int(address, 16) for address in addresses.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGEOUT)
