"""The batches of a request: how many images run together, and the arrays that they give to the graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.bundle import Bundle
from ..engines.device import Array
from ..engines.errors import MissingPlanError
from .loop.inputs import InitialImage, blank_arrays, loop_arrays
from .loop.session import Session
from .prompt.numbers import number_inputs
from .prompt.tokenizer import Tokenizer, encode_prompts
from .request import GenerationRequest
from .result import GenerationResult
from .sampling.step_table import StepTable

Arrays = tuple[dict[str, Array], dict[str, Array]]
"""What a batch gives to the graphs before the loop, and to the loop, by tensor name."""


@dataclass(frozen=True)
class Batch:
    """Images of a request that are denoised together."""

    first: int
    """The index of its first image in the request."""
    images: Sequence[tuple[str, str, int]]
    """Prompt, negative prompt and seed of each."""
    rows: int
    """How many are computed: more than there are where that saves an engine; what is over is thrown away."""


class Batches:
    """Makes the batches of requests to one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Load the tokenizers."""
        self._bundle = bundle
        self._tokenizers = [Tokenizer(bundle.file(info.file), info) for info in bundle.manifest.tokenizers]

    def split(
        self, request: GenerationRequest, table: StepTable, session: Session, max_batch: int, *, picture: bool
    ) -> Iterator[Batch]:
        """Yield the batches of a complete request; before the first, every engine that it lacks is built.

        A backend whose engines are for fixed shapes computes the last, smaller batch at the size of those before it,
        and a batch that no engine may be built for at the next size that has one. Raises `MissingPlanError` where
        there is none.
        """
        images = request.images
        counts = [len(images[first : first + max_batch]) for first in range(0, len(images), max_batch)]
        rows = {count: count for count in counts}
        if not session.backend.dynamic:
            encoded = (1, request.height or 0, request.width or 0, 3) if picture else None
            rows[counts[0]] = self._size(request, table, session, counts[0], max_batch, encoded)
            last = counts[-1]
            if last < counts[0] and not session.keeps(*self.blank(self._bundle, request, table, last)):
                rows[last] = rows[counts[0]]
        for number, count in enumerate(counts):
            first = number * max_batch
            yield Batch(first, images[first : first + count], rows[count])

    def _size(
        self,
        request: GenerationRequest,
        table: StepTable,
        session: Session,
        count: int,
        most: int,
        picture: tuple[int, ...] | None,
    ) -> int:
        """Return how many images to compute for `count`: as many, or where there is no engine the next that has one."""
        missing = None
        for rows in range(count, most + 1):
            try:
                session.prepare(*self.blank(self._bundle, request, table, rows), picture)
                return rows
            except MissingPlanError as error:
                missing = missing or error
        assert missing is not None
        raise missing

    @staticmethod
    def blank(bundle: Bundle, request: GenerationRequest, table: StepTable, count: int) -> Arrays:
        """Return arrays of the names, types and shapes of a batch of `count` images, before anything is drawn."""
        latent, rows = bundle.manifest.latent, count * request.branches
        inputs: dict[str, Array] = {
            info.output: np.zeros((rows, info.max_length), np.int64) for info in bundle.manifest.tokenizers
        }
        inputs |= number_inputs(bundle, request, rows)
        arrays = blank_arrays(
            table,
            count,
            (latent.channels, (request.height or 0) // latent.downscale, (request.width or 0) // latent.downscale),
            guidance_scale=request.guidance_scale or 0.0,
            branches=request.branches,
            network_dtype=next(t.dtype for t in bundle.graph("denoiser").inputs if t.name == "model_input"),
        )
        return inputs, arrays

    def arrays(
        self,
        request: GenerationRequest,
        batch: Batch,
        table: StepTable,
        initial: InitialImage | None,
        finished: GenerationResult[object],
    ) -> Arrays:
        """Return a batch's arrays, and note in the result how long they took and what did not fit."""
        began = time.perf_counter()
        images = [*batch.images, *[batch.images[-1]] * (batch.rows - len(batch.images))]
        inputs, blank = self.blank(self._bundle, request, table, batch.rows)
        inputs |= encode_prompts(self._tokenizers, images, request.branches, finished.warn)
        tokenized = time.perf_counter()
        everywhere = initial is not None and initial.mask is not None and request.strength == 1
        seeds = [seed for _, _, seed in images]
        arrays = loop_arrays(blank, table, seeds, initial=initial, repaint_all=everywhere)
        finished.timings.tokenize += tokenized - began
        finished.timings.prepare += time.perf_counter() - tokenized
        return inputs, arrays
