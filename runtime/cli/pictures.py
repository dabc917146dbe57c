"""Where pictures go: a file, standard output or numbered files, written in a thread while the next batch is drawn."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ...engines.errors import RequestError
from ...engines.files import storage_error, write_atomically
from ..pictures.png import encode_png
from ..request import GenerationRequest

NUMBERED = re.compile(r"latentrt-(\d{4,})-")
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

    def write(self, seed: int, png: bytes) -> Path:
        """Write one picture and return its path; raises `StorageError`."""
        if self.is_stdout:
            sys.stdout.buffer.write(png)
            sys.stdout.buffer.flush()
        elif self.is_file:
            write_atomically(self.path, png)
        else:
            return write_numbered(self.path, seed, png)
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
        self._written: list[Future[dict[str, Any]]] = []

    def __call__(self, request: GenerationRequest, first: int, images: Sequence[Image.Image]) -> None:
        """Take a batch; raises `StorageError` when an earlier picture could not be written."""
        for earlier in self._written:
            if earlier.done():
                earlier.result()
        for number, picture in enumerate(images, first):
            self._written.append(self._thread.submit(self._write, request, number, picture))

    def entries(self) -> list[dict[str, Any]]:
        """Return path, seed and prompt of every picture once all are written; raises `StorageError`."""
        return [picture.result() for picture in self._written]

    def rescued(self) -> list[dict[str, Any]]:
        """Return the entries of the pictures that were written, once the others have failed or been written."""
        return [picture.result() for picture in self._written if picture.exception() is None]

    def _write(self, request: GenerationRequest, number: int, picture: Image.Image) -> dict[str, Any]:
        prompt, negative, seed = request.images[number]
        own = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "num_images_per_prompt": 1}
        png = encode_png(picture, {**request.model_dump(mode="json"), **own, **self._described})
        return {"path": str(self._target.write(seed, png)), "seed": seed, "prompt": prompt}

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)


def write_numbered(folder: Path, seed: int, data: bytes) -> Path:
    """Write a picture to a new file, numbered behind those that are in `folder`, and return its path.

    The name is taken before the picture is written, so no other process takes it; raises `StorageError`.
    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(match[1]) for p in folder.glob("latentrt-*.png") if (match := NUMBERED.match(p.name))]
            path = folder / f"latentrt-{max(taken, default=0) + 1:04d}-seed{seed}.png"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                break
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        write_atomically(path, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
