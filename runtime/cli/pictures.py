"""Pictures go to disk in a thread, while the next batch is on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ..image import encode_png
from ..request import GenerationRequest
from .files import free_paths, write_atomically


class PictureWriter:
    """A `BatchCallback` that encodes and writes pictures; a context manager, which waits for what it has been given.

    Pictures go to `file`, or under new names into `folder`. A request that is cancelled leaves the pictures of its
    finished batches.
    """

    def __init__(self, file: Path | None, folder: Path, described: Mapping[str, Any]) -> None:
        self._file, self._folder, self._described = file, folder, described
        self._paths: list[Path] = []
        self._thread = ThreadPoolExecutor(1, "png")
        self._written: list[Future[dict[str, Any]]] = []

    def __call__(self, request: GenerationRequest, first: int, images: Sequence[Image.Image]) -> None:
        """Take a batch; raises `StorageError` when an earlier picture could not be written."""
        for earlier in self._written:
            if earlier.done():
                earlier.result()
        if not self._paths:
            seeds = [seed for _, _, seed in request.images]
            self._paths = [self._file] if self._file is not None else free_paths(self._folder, seeds)
        for number, picture in enumerate(images, first):
            self._written.append(self._thread.submit(self._write, request, number, picture))

    def entries(self) -> list[dict[str, Any]]:
        """Return path, seed and prompt of every picture once all are written; raises `StorageError`."""
        return [picture.result() for picture in self._written]

    def _write(self, request: GenerationRequest, number: int, picture: Image.Image) -> dict[str, Any]:
        prompt, negative, seed = request.images[number]
        path = self._paths[number]
        own = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "num_images_per_prompt": 1}
        write_atomically(path, encode_png(picture, {**request.model_dump(mode="json"), **own, **self._described}))
        return {"path": str(path), "seed": seed, "prompt": prompt}

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
