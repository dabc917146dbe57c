"""Where pictures go: a file, standard output or numbered files, written in a thread while the next batch is drawn."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any

from PIL import Image

from ...engines.errors import RequestError, StorageError
from ...engines.files import storage_error, sweep, write_atomically, write_new
from ..pictures.png import encode_png
from ..request import GenerationRequest

NUMBERED = re.compile(r"latentrt-(\d{4,})-")
MAX_WAITING = 16
"""Pictures that wait to be written before the next batch has to."""
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Target:
    """Where the pictures of a request go: standard output for `-`, one file, or a folder of numbered files."""

    path: Path

    @classmethod
    def of(cls, path: Path, pictures: int) -> Target:
        """Return the target of a number of pictures; raises `RequestError` when they cannot go there."""
        target = cls(path)
        if target.is_stdout:
            if pictures != 1:
                raise RequestError(f"--output - is one picture of {pictures}: give a folder")
            if sys.stdout.isatty():
                raise RequestError("--output - would write a PNG to the terminal: redirect it, or name a .png file")
        elif target.is_file:
            check_png("--output", path)
            if pictures != 1:
                raise RequestError(f"--output {path} is one file for {pictures} pictures: give a folder")
        return target

    @property
    def is_stdout(self) -> bool:
        """Whether the picture goes to standard output, which then carries nothing else."""
        return self.path == Path("-")

    @property
    def is_file(self) -> bool:
        """Whether the name is a picture's; every other name, and a folder that exists, is a folder."""
        return self.path.suffix.lower() in PICTURE_SUFFIXES and not self.path.is_dir()

    def write(self, seed: int, png: bytes, before: Path | None = None) -> Path:
        """Write one picture, numbered behind the one `before` it, and return its path; raises `StorageError`."""
        if self.is_stdout:
            try:
                sys.stdout.buffer.write(png)
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise storage_error("standard output", error) from error
        elif self.is_file:
            write_atomically(self.path, png)
        else:
            return write_numbered(self.path, seed, png, None if before is None else _number(before))
        return self.path


def check_png(option: str, path: Path) -> None:
    """Raise `RequestError` unless a PNG can be written under this name."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise RequestError(f"{option} {path} is not a .png file: pictures are written as PNG")


class PictureWriter:
    """A `BatchCallback` that encodes and writes pictures; a context manager, which waits for what it has been given.

    A request that is cancelled leaves the pictures of its finished batches.
    """

    def __init__(self, target: Target, described: Mapping[str, Any]) -> None:
        """Write to `target`; `described` goes into every PNG, beside its request."""
        self._target, self._described = target, described
        self._thread = ThreadPoolExecutor(1, "png")
        self._waiting = BoundedSemaphore(MAX_WAITING)
        self._written: list[Future[dict[str, Any]]] = []
        self._looked_at = 0
        self._last: Path | None = None

    def __call__(self, request: GenerationRequest, first: int, images: Sequence[Image.Image]) -> None:
        """Take a batch; raises `StorageError` when an earlier picture could not be written."""
        while self._looked_at < len(self._written) and self._written[self._looked_at].done():
            self._written[self._looked_at].result()
            self._looked_at += 1
        for number, picture in enumerate(images, first):
            self._waiting.acquire()  # a disk slower than the device holds the device back, not the memory
            self._written.append(self._thread.submit(self._write, request, number, picture))

    def entries(self) -> list[dict[str, Any]]:
        """Return path, seed and prompt of every picture once all are written; raises `StorageError`."""
        return [picture.result() for picture in self._written]

    def rescued(self) -> list[dict[str, Any]]:
        """Return the entries of the pictures that were written, once the others have failed or been written."""
        return [picture.result() for picture in self._written if picture.exception() is None]

    def _write(self, request: GenerationRequest, number: int, picture: Image.Image) -> dict[str, Any]:
        try:
            prompt, negative, seed = request.images[number]
            shared = request.model_dump(mode="json", exclude={"prompt", "negative_prompt"})
            own = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "num_images_per_prompt": 1}
            png = encode_png(picture, {**own, **shared, **own, **self._described})
            self._last = self._target.write(seed, png, self._last)
            return {"path": str(self._last), "seed": seed, "prompt": prompt}
        finally:
            self._waiting.release()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)


def _number(path: Path) -> int:
    match = NUMBERED.match(path.name)
    return int(match[1]) if match else 0


def write_numbered(folder: Path, seed: int, data: bytes, after: int | None = None) -> Path:
    """Write a picture to a new file, numbered behind `after`, or behind all in `folder`, and return its path.

    It appears whole under a name that no other process has taken; raises `StorageError`. Without `after`, unfinished
    pictures of processes that were killed are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if after is None:
            sweep(folder, NUMBERED.pattern + r"seed\d+\.png")
            after = max(map(_number, folder.glob("latentrt-*.png")), default=0)
        path = _next(folder, after, seed)
        while path.exists() or not write_new(path, data):
            path = _next(folder, _number(path), seed)
    except OSError as error:
        raise error if isinstance(error, StorageError) else storage_error(folder, error) from error
    return path


def _next(folder: Path, number: int, seed: int) -> Path:
    return folder / f"latentrt-{number + 1:04d}-seed{seed}.png"
