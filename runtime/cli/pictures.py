"""Pictures go to disk in a thread, while the next batch is on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ...engines.files import write_atomically
from ..pictures.image import encode_png
from ..request import GenerationRequest
from .files import write_numbered


class PictureWriter:
    """A `BatchCallback` that encodes and writes pictures; a context manager, which waits for what it has been given.

    Pictures go to `file`, or under new names into `folder`. A request that is cancelled leaves the pictures of its
    finished batches.
    """

    def __init__(self, file: Path | None, folder: Path, described: Mapping[str, Any]) -> None:
        self._file, self._folder, self._described = file, folder, described
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
        if self._file is None:
            path = write_numbered(self._folder, seed, png)
        else:
            path = self._file
            write_atomically(path, png)
        return {"path": str(path), "seed": seed, "prompt": prompt}

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
