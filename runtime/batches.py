"""The batches of a request: how many images run together, and the arrays that they give to the graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..engines.bundle import Bundle
from ..engines.device import Array
from ..engines.errors import MissingPlanError
from .loop.generators import Noise
from .loop.inputs import Draws, InitialImage, Latents, blank_arrays, draw_each, draw_together, loop_arrays
from .loop.session import Session
from .prompt.conditioning import takes_long_prompts
from .prompt.embeddings import Conditioning
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
        self.tokenizers = [Tokenizer(bundle.file(info.file), info) for info in bundle.manifest.tokenizers]
        self._advice = (
            "; prompt_syntax a1111 or compel takes prompts of any length" if takes_long_prompts(bundle) else ""
        )
        self._together: Draws | None = None

    def split(
        self,
        request: GenerationRequest,
        table: StepTable,
        session: Session,
        max_batch: int,
        *,
        picture: bool,
        conditioning: Conditioning | None = None,
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
            blank = partial(self.blank, self._bundle, request, table, conditioning=conditioning)
            rows[counts[0]] = self._size(blank, session, range(counts[0], max_batch + 1), encoded)
            last = counts[-1]
            if last < counts[0] and not session.keeps(*blank(last)):
                rows[last] = rows[counts[0]]
        for number, count in enumerate(counts):
            first = number * max_batch
            yield Batch(first, images[first : first + count], rows[count])

    @staticmethod
    def _size(blank: Callable[[int], Arrays], session: Session, counts: range, picture: tuple[int, ...] | None) -> int:
        """Return how many images to compute: the first of `counts`, or where there is no engine the next that has."""
        missing = None
        for rows in counts:
            try:
                session.prepare(*blank(rows), picture)
                return rows
            except MissingPlanError as error:
                missing = missing or error
        assert missing is not None
        raise missing

    @staticmethod
    def blank(
        bundle: Bundle,
        request: GenerationRequest,
        table: StepTable,
        count: int,
        conditioning: Conditioning | None = None,
    ) -> Arrays:
        """Return arrays of the names, types and shapes of a batch of `count` images, before anything is drawn."""
        latent, rows = bundle.manifest.latent, count * request.branches
        if conditioning is None:
            tokens = bundle.manifest.tokenizers
            inputs: dict[str, Array] = {info.output: np.zeros((rows, info.max_length), np.int64) for info in tokens}
        else:
            inputs = {conditioning.name: conditioning.blank(rows)}
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
        *,
        noise: Noise,
        latents: Latents | None = None,
        conditioning: Conditioning | None = None,
    ) -> Arrays:
        """Return a batch's arrays, and note in the result how long they took and what did not fit.

        `latents` are the first latents of all images, before they are scaled, where the caller gave them.
        """
        began = time.perf_counter()
        count, first = len(batch.images), batch.first
        inputs, blank = self.blank(self._bundle, request, table, batch.rows, conditioning)
        if conditioning is None:
            images = [*batch.images, *[batch.images[-1]] * (batch.rows - count)]
            inputs |= encode_prompts(self.tokenizers, images, request.branches, finished.warn, self._advice)
        else:
            inputs[conditioning.name] = conditioning.rows(first, count, batch.rows)
        tokenized = time.perf_counter()
        shape = blank["latents"].shape[1:]
        if noise.shared:
            if first == 0:
                self._together = draw_together(noise.sources[0], table, (len(request.images), *shape), initial, latents)
            draws = self._together
            assert draws is not None
            draws = draws.rows(first, count, batch.rows)
        else:
            given = None if latents is None else latents[first : first + count]
            draws = draw_each(noise.sources[first : first + count], table, shape, initial, given)
            draws = draws.rows(0, count, batch.rows)
        masked = initial is not None and initial.mask is not None
        everywhere = masked and (request.strength == 1 or latents is not None)
        arrays = loop_arrays(blank, table, draws, initial=initial, first_image=first, from_noise=everywhere)
        finished.timings.tokenize += tokenized - began
        finished.timings.prepare += time.perf_counter() - tokenized
        return inputs, arrays

    def tokens(self, text: str) -> dict[str, Array]:
        """Return the token ids [1, L] of a text, by graph input."""
        return {each.info.output: each.encode_negative(text).ids[None] for each in self.tokenizers}
