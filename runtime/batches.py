"""The batches of a request: how many images run together, and the arrays that they give to the graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from ..engines.bundle import Bundle
from ..engines.device import Array
from ..engines.errors import MissingPlanError
from .loop.decoding import WHOLE, Decoding
from .loop.generators import Noise
from .loop.hoisted import row_timesteps
from .loop.inputs import Draws, InitialImage, Latents, blank_arrays, draw_each, draw_together, loop_arrays
from .loop.session import Session
from .prompt.conditioning import takes_long_prompts
from .prompt.embeddings import Conditioning, Read
from .prompt.numbers import number_inputs
from .prompt.tokenizer import Texts, Tokenizer, encode_prompts, row_lengths
from .request import GenerationRequest
from .result import GenerationResult
from .sampling.step_table import StepOption, StepTable, step_options

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
    lengths: Mapping[str, int]
    """Tokens of a row, by graph input."""
    decoding: Decoding
    """How its latents become pictures."""


class Batches:
    """Makes the batches of requests to one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Load the tokenizers."""
        self._bundle = bundle
        self.tokenizers = [Tokenizer(bundle.file(info.file), info) for info in bundle.manifest.tokenizers]
        self._advice = (
            "; prompt_syntax a1111 or compel takes prompts of any length" if takes_long_prompts(bundle) else ""
        )

    def split(
        self,
        request: GenerationRequest,
        table: StepTable,
        session: Session,
        max_batch: int,
        *,
        picture: bool,
        conditioning: Conditioning | None = None,
        decodings: Sequence[Decoding] = (WHOLE,),
    ) -> Iterator[Batch]:
        """Yield the batches of a complete request; before the first, every engine that it lacks is built.

        A backend whose engines are for fixed shapes computes the last, smaller batch at the size of those before it,
        and a batch that no engine may be built for at the next size that has one: with more padding behind its prompts,
        then of more images; where the decoder has none, by the next of `decodings`. Raises `MissingPlanError` where
        there is none.
        """
        images, decoding = request.images, decodings[0]
        lengths: Mapping[str, int] = {} if conditioning else self._lengths(request)
        counts = [len(images[first : first + max_batch]) for first in range(0, len(images), max_batch)]
        rows = {count: count for count in counts}
        if not session.backend.dynamic:
            asked = table.asked(len(request.weights(self._bundle.manifest.guidance)))
            encoded = (1, request.height or 0, request.width or 0, 3) if picture else None
            blank = partial(self.blank, self._bundle, request, table, conditioning=conditioning)
            sizes = product(decodings, range(counts[0], max_batch + 1), self._longer(lengths))
            decoding, rows[counts[0]], lengths = self._size(blank, session, sizes, encoded, asked)
            last = counts[-1]
            if last < counts[0] and not session.keeps(*blank(last, lengths=lengths), decoding, asked):
                rows[last] = rows[counts[0]]
        for number, count in enumerate(counts):
            first = number * max_batch
            yield Batch(first, images[first : first + count], rows[count], lengths, decoding)

    def _lengths(self, request: GenerationRequest) -> dict[str, int]:
        """Return how many tokens a row of each tokenizer's graph input has in the batches of a request."""

        def texts(source: str) -> set[str]:
            guided = len(request.weights(self._bundle.manifest.guidance)) == 2
            return {*request.texts(source), *(request.texts(source, negative=True) if guided else ())}

        return row_lengths(self.tokenizers, texts, request.max_sequence_length)

    def _longer(self, lengths: Mapping[str, int]) -> list[dict[str, int]]:
        """Return the lengths of rows that prompts fit in, by graph input, those that they need first."""
        each = {info.output: (*info.lengths, info.max_length) for info in self._bundle.manifest.tokenizers}
        longer = {info.output for info in self._bundle.manifest.tokenizers if info.lengths}
        options = {
            name: [n for n in each[name] if n >= length] if name in longer else [length]
            for name, length in lengths.items()
        }
        most = max(map(len, options.values()), default=1)
        return [{name: option[min(more, len(option) - 1)] for name, option in options.items()} for more in range(most)]

    @staticmethod
    def _size(
        blank: Callable[..., Arrays],
        session: Session,
        sizes: Iterable[tuple[Decoding, int, Mapping[str, int]]],
        picture: tuple[int, ...] | None,
        asked: tuple[int, ...],
    ) -> tuple[Decoding, int, Mapping[str, int]]:
        """Return how to decode, how many images to compute, and how long rows are: the first that has engines."""
        missing = None
        for decoding, rows, lengths in sizes:
            try:
                session.prepare(*blank(rows, lengths=lengths), picture, decoding, asked)
                return decoding, rows, lengths
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
        lengths: Mapping[str, int] | None = None,
    ) -> Arrays:
        """Return arrays of the names, types and shapes of a batch of `count` images, before anything is drawn.

        `lengths` are the tokens of a row, by graph input, where they are not the most.
        """
        mix, latents = request.weights(bundle.manifest.guidance), _latents_of(bundle, request)
        rows, lengths = count * len(mix), lengths or {}
        inputs: dict[str, Array] = {}
        for info in bundle.manifest.tokenizers if conditioning is None else ():
            shape = (rows, lengths.get(info.output, info.max_length))
            inputs[info.output] = np.zeros(shape, np.int64)
            if info.mask_output is not None:
                inputs[info.mask_output] = np.zeros(shape, input_types(bundle)[info.mask_output])
        if conditioning is not None:
            inputs |= conditioning.blank(rows)
        inputs |= number_inputs(bundle, request, count, rows - count)
        inputs = _of_all_rows(inputs, bundle, count, table)
        rows += count * table.skips
        types = {spec.name: spec.dtype for spec in bundle.graph("denoiser").inputs}
        inputs |= row_timesteps(bundle.manifest, table, rows)
        if (masked := bundle.manifest.masked_input) is not None:
            inputs[masked] = np.zeros((rows, 1 + latents[0], *latents[1:]), types[masked])
        arrays = blank_arrays(
            table,
            count,
            latents,
            mix=mix,
            network_dtype=types["model_input"],
            options=options_of_bundle(bundle),
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
        together: Draws | None = None,
        latents: Latents | None = None,
        conditioning: Conditioning | None = None,
    ) -> Arrays:
        """Return a batch's arrays, and note in the result how long they took and what did not fit.

        `together` is what `together` returned, `latents` are the first latents of all images, before they are scaled,
        where the caller gave them.
        """
        began = time.perf_counter()
        count, first = len(batch.images), batch.first
        inputs, blank = self.blank(self._bundle, request, table, batch.rows, conditioning, batch.lengths)
        if conditioning is None:
            texts: Texts = {each.info.source: self._texts(request, batch, each.info.source) for each in self.tokenizers}
            types = input_types(self._bundle)
            found = encode_prompts(self.tokenizers, texts, batch.lengths, types, finished.warn, self._advice)
        else:
            found = conditioning.rows(first, count, batch.rows)
        inputs |= _of_all_rows(found, self._bundle, batch.rows, table)
        tokenized = time.perf_counter()
        shape = blank["latents"].shape[1:]
        from_noise = _from_noise(request, initial, latents)
        if together is not None:
            draws = together.rows(first, count, batch.rows)
        else:
            given = None if latents is None else latents[first : first + count]
            draws = draw_each(noise.sources[first : first + count], table, shape, initial, given, from_noise)
            draws = draws.rows(0, count, batch.rows)
        arrays = loop_arrays(blank, table, draws, initial=initial, first_image=first, from_noise=from_noise)
        if (masked := self._bundle.manifest.masked_input) is not None and initial is not None:
            assert draws.masked is not None
            beside = initial.beside(first + np.arange(len(draws.masked)), draws.masked)
            inputs[masked] = beside[arrays["image_of_row"]].astype(inputs[masked].dtype)
        finished.timings.tokenize += tokenized - began
        finished.timings.prepare += time.perf_counter() - tokenized
        return inputs, arrays

    def together(
        self,
        request: GenerationRequest,
        table: StepTable,
        noise: Noise,
        initial: InitialImage | None,
        latents: Latents | None,
        finished: GenerationResult[object],
    ) -> Draws | None:
        """Return what all images of a request draw where one source draws for them, and note how long it took."""
        if not noise.shared:
            return None
        began = time.perf_counter()
        shape = (len(request.images), *_latents_of(self._bundle, request))
        from_noise = _from_noise(request, initial, latents)
        draws = draw_together(noise.sources[0], table, shape, initial, latents, from_noise)
        finished.timings.prepare += time.perf_counter() - began
        return draws

    def _texts(self, request: GenerationRequest, batch: Batch, source: str) -> tuple[list[str], list[str]]:
        """Return the negative prompts, none without guidance, and the prompts of a batch's rows."""
        index = [
            image // request.num_images_per_prompt for image in range(batch.first, batch.first + len(batch.images))
        ]
        index += [index[-1]] * (batch.rows - len(index))
        guided = len(request.weights(self._bundle.manifest.guidance)) == 2
        prompts, negatives = request.texts(source), request.texts(source, negative=True) if guided else ()
        return [negatives[i] for i in index] if guided else [], [prompts[i] for i in index]

    def read(self, request: GenerationRequest, *, negative: bool) -> list[Read]:
        """Return what the tokenizers read of each prompt of a request, or of what it should not show."""
        return list(zip(*(request.texts(each.info.source, negative=negative) for each in self.tokenizers), strict=True))

    def tokens(
        self, *prompt: str, length: int | None = None, warn: Callable[[str, int], None] = lambda *_: None
    ) -> dict[str, Array]:
        """Return the token ids [1, L] of a prompt, and masks of them, by graph input; each tokenizer has its text.

        `length` is of rows of any, `warn` is told what was cut off.
        """
        most = {each.info.output: each.info.max_length for each in self.tokenizers}
        lengths = most | {each.info.output: length for each in self.tokenizers if each.info.any_length and length}
        texts: Texts = {each.info.source: ((), (text,)) for each, text in zip(self.tokenizers, prompt, strict=True)}
        return encode_prompts(self.tokenizers, texts, lengths, input_types(self._bundle), warn)


def _latents_of(bundle: Bundle, request: GenerationRequest) -> tuple[int, int, int]:
    """Return the shape of an image's latents, [C, h, w]."""
    latent = bundle.manifest.latent
    return latent.channels, (request.height or 0) // latent.downscale, (request.width or 0) // latent.downscale


def _from_noise(request: GenerationRequest, initial: InitialImage | None, latents: Latents | None) -> bool:
    """Tell whether a request starts from pure noise although there is an initial picture."""
    covered = initial is not None and initial.mask is not None
    return covered and (request.strength == 1 or latents is not None)


def _of_all_rows(inputs: Mapping[str, Array], bundle: Bundle, count: int, table: StepTable) -> dict[str, Array]:
    """Return inputs [R, ...] with the rows of prompts, the last `count`, before all others where a table skips layers.

    With them goes what tells the denoiser which rows those are.
    """
    if (skipped := bundle.manifest.guidance.skipped) is None:
        return dict(inputs)
    again = count if table.skips else 0
    found = {name: np.concatenate([rows[len(rows) - again :], rows]) for name, rows in inputs.items()}
    dtype = input_types(bundle)[skipped.input]
    rows = len(next(iter(found.values())))
    return {**found, skipped.input: (np.arange(rows) < again).astype(dtype)}


def options_of_bundle(bundle: Bundle) -> tuple[StepOption, ...]:
    """Return what a bundle's step graph does beside applying the rows of a table."""
    return step_options([spec.name for spec in bundle.graph("step").inputs])


def input_types(bundle: Bundle) -> dict[str, str]:
    """Return the element type of every graph input."""
    return {spec.name: spec.dtype for graph in bundle.manifest.graphs for spec in graph.inputs}
