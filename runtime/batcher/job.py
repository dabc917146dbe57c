"""A request in a batcher: its images, which come and go by themselves, and the future of its result."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...engines.bundle import Manifest
from ...engines.device import Array
from ...engines.errors import RequestError
from ..batches import Arrays, Batch
from ..call import Call, check_function
from ..loop.decoding import NO_WHOLE, Decoding, shown_by
from ..loop.guidance import wide_rows
from ..loop.inputs import InitialImage, go_on
from ..loop.pack import branch_weights
from ..loop.widths import check_seconds, check_whole
from ..pipeline import Pipeline
from ..prompt.conditioning import WeightedPrompts
from ..prompt.embeddings import Conditioning
from ..result import GenerationResult
from ..sampling import clean_factors
from ..sampling.step_table import Guided
from .deliver import Box
from .events import BatchFuture, Event, JobProgress, Listener
from .policy import Candidate
from .prepared import Fit, Parked, Prepared, StepNoise, fit_of, prepared, region, table_names, without_draws

MOST_PREVIEWS = 3

log = logging.getLogger(__name__)

_SIGNATURE = inspect.signature(Pipeline.__call__)
ELSEWHERE = (
    *("callback_on_step_end", "callback", "callback_steps", "on_batch", "progress", "keep_images", "return_dict"),
)
"""Arguments of a pipeline's call that follow one batch from its first step to its last."""


@dataclass(eq=False)
class Image:
    """One image of a request."""

    job: Job
    index: int
    candidate: Candidate
    prepared: Prepared | None = None
    done: int = 0
    """Steps that have been enqueued."""
    admitted: bool = False
    """Whether it has, or had, a slot."""
    parked: Parked | None = None
    """What it had come to when it left its slot to another."""

    def leave(self) -> None:
        """Let go of what it needs to be drawn."""
        self.prepared = None
        if self.parked is not None:
            self.parked.close()
            self.parked = None

    @property
    def now(self) -> Candidate:
        """What the policy knows of it at present."""
        return replace(self.candidate, done=self.done) if self.done else self.candidate


@dataclass(eq=False)
class Job:
    """A request, from its arrival to its result."""

    pipe: Pipeline
    call: Call
    table: Any
    fit: Fit
    finished: GenerationResult[Any]
    arrived: float
    due: float | None
    """When it is too late (`time.monotonic`), or None."""
    previews: Mapping[int, int] = field(default_factory=dict)
    """Numbers of previews by the evaluations after which they are shown."""
    listener: Listener | None = None
    manifest: Manifest = field(init=False)
    """The bundle's, with the scheduler that the pipeline had when the request came."""
    decoding: Decoding = field(init=False)
    """How its latents become pictures."""
    future: BatchFuture = field(init=False)
    images: list[Image] = field(default_factory=list)
    finished_images: set[int] = field(default_factory=set)
    pictures: dict[int, Any] = field(default_factory=dict)
    """What the request gets, by image."""
    box: Box = field(default_factory=Box)
    began: float | None = None
    """When its first image got a slot (`time.monotonic`), or None."""
    error: BaseException | None = None
    over: bool = False
    """Whether the rest of its images is to be dropped."""
    ended: JobProgress | None = None
    """How far it had come when its future was settled."""
    _prompts: WeightedPrompts | None = None
    _lengths: Mapping[str, int] = field(default_factory=dict)
    _blank: Arrays = field(default_factory=lambda: ({}, {}))
    _early: bool = False
    """Whether its images can be prepared before an engine runs."""
    _ready: bool = False
    _complained: bool = False

    @classmethod
    def of(
        cls,
        pipe: Pipeline,
        arguments: Mapping[str, Any],
        *,
        progress: Callable[[Job], JobProgress],
        timeout: float | None = None,
        previews: int = 0,
        listener: Listener | None = None,
    ) -> Job:
        """Check a request; raises as the pipeline's own call does."""
        check_whole("previews", previews, 0, MOST_PREVIEWS)
        check_seconds("timeout", timeout)
        check_function("on_event", listener)
        began = time.monotonic()
        given, manifest = _given(arguments), pipe._manifest
        call = Call.of(pipe.bundle, manifest, given)
        request, bundle = call.request, pipe.bundle
        table, finished = pipe._begun(call, given)
        prompts = conditioning = None
        if request.prompt_syntax is not None:
            prompts = WeightedPrompts(bundle, request, pipe._batches.tokenizers)
            conditioning = prompts.blank
        elif call.embeddings is not None:
            conditioning = Conditioning(call.embeddings.prompt or call.embeddings.negative, {}, 1)
        lengths = {} if conditioning else pipe._batches._lengths(request)
        inputs, arrays = pipe._batches.blank(bundle, request, table, 1, conditioning, lengths)
        table_names(bundle)
        channels, height, width = arrays["latents"].shape[1:]
        fit = fit_of(bundle, inputs, (channels, height, width), table)
        due = None if timeout is None else began + timeout
        job = cls(pipe, call, table, fit, finished, began, due, listener=listener, _prompts=prompts, _lengths=lengths)
        job.manifest, job.decoding = manifest, call.decodings[0]
        job.future = BatchFuture(request, finished.seeds, lambda: progress(job))
        branches = len(request.weights(manifest.guidance))
        candidate = Candidate(began, branches + table.skips, len(table), guided=wide_rows(table, branches))
        job.images = [Image(job, index, candidate) for index in range(len(request.images))]
        if listener is not None:
            steps = [round(len(table) * number / (previews + 1)) for number in range(1, previews + 1)]
            job.previews = {step: number for number, step in enumerate(steps, 1) if 0 < step < len(table)}
        job._blank = {name: array[:1] for name, array in inputs.items()}, arrays
        job._early = call.pictures is None and conditioning is None
        return job

    def decode_as(self, decoding: Decoding) -> None:
        """Choose how its latents become pictures, and note it where that is not the first that was asked for."""
        self.decoding = decoding
        if decoding != self.call.decodings[0]:
            self.finished.warn(NO_WHOLE.format(self.call.request.width, self.call.request.height))

    @property
    def needs(self) -> frozenset[Hashable]:
        """What stands for the engines that its images need beside their steps."""
        rows = tuple((name, array.shape) for name, array in self._blank[0].items())
        pictures = {"image_encoder"} if self.call.pictures is not None else set()
        shown = {shown_by(self.pipe.bundle, self.decoding)} if self.previews else set()
        return frozenset({rows, self.decoding, *pictures, *shown})

    def blank_row(self) -> Arrays:
        """Return arrays of the shapes of one network row's inputs, and of those of one image in the loop."""
        return self._blank

    def prepare_early(self) -> None:
        """Prepare the images where that needs no engine, on the caller's thread."""
        if self._early:
            self._prepare(None, None)

    def tell(self, event: Event) -> None:
        """Call the request's listener; the first thing that it raises is logged, and no more comes of it."""
        if self.listener is None:
            return
        try:
            self.listener(event)
        except Exception:
            if not self._complained:
                log.exception("on_event of a request failed")
            self._complained = True

    def end(self, error: BaseException | None = None) -> bool:
        """Note the end of the request, with the error that was its end, and tell whether it was not over before."""
        if self.over:
            return False
        self.over, self.error = True, error
        return True

    def let_go(self) -> None:
        """Cut the circles through a settled request: its pictures would be there until Python looks for circles."""
        self.ended = ended = self.future.progress()
        self.future._progress = lambda: ended
        self.images = []

    @property
    def work(self) -> int:
        """Network rows times evaluations that are still to be run."""
        return 0 if self.over else sum(image.now.work for image in self.images)

    def clean(self, row: int, latents: Array, history: Array, *predictions: Array) -> Array:
        """Return the clean latents [1, C, h, w] that the network's predictions [1, ...] in a row of the table speak of.

        They are those of the last branches, as many as the row asks for. `latents` and `history` are what it read.
        """
        table, parts = self.table, [each[:, : latents.shape[1]] for each in predictions]  # behind: learned variances
        mix = self.call.request.weights(self.manifest.guidance)
        weights = branch_weights(table, mix, len(mix) + table.skips)[row]
        predicted = np.tensordot(weights[-len(parts) :], parts, 1)
        if table.guided and table.guided[row] is Guided.AS_BEFORE:
            predicted = predicted + history[:, table.added]
        a, b = clean_factors(self.manifest.scheduler, self.call.request.sampler, table, row)
        return (a * latents + b * predicted).astype(np.float32)

    def prepare(self) -> None:
        """Encode pictures and prompts that need it, and prepare the images; on the thread that holds the session."""
        if self._ready:
            return
        conditioning, request = None, self.call.request
        if self._prompts is not None:
            conditioning = self.pipe._weighted(self._prompts, self.call, 1, self.finished)
        elif self.call.embeddings is not None:
            conditioning = self.pipe._conditioning(self.call.embeddings, request, self.finished)
        pictures = self.call.pictures
        self._prepare(self.pipe._initial(request, pictures) if pictures else None, conditioning)

    def _prepare(self, initial: InitialImage | None, conditioning: Conditioning | None) -> None:
        """Draw for every image, and lay out its arrays."""
        self._ready = True  # once: generators of a caller go on from where they were left
        batches, call, tables = self.pipe._batches, self.call, None
        seeded = not call.noise.shared and all(isinstance(source, int) for source in call.noise.sources)
        table = without_draws(self.table) if seeded else self.table  # seeds are drawn from step by step
        together = batches.together(call.request, table, call.noise, initial, call.latents, self.finished)
        for image in self.images:
            inputs, arrays = batches.arrays(
                call.request,
                Batch(image.index, [call.request.images[image.index]], 1, self._lengths, self.decoding),
                table,
                initial,
                self.finished,
                noise=call.noise,
                together=together,
                latents=call.latents,
                conditioning=conditioning,
            )
            source = go_on() if seeded and self.table.draw_count else arrays["noise"][0, : self.table.draw_count].copy()
            tables = tables or region(arrays, table_names(self.pipe.bundle), len(self.table) + 1, self.fit)
            image.prepared = prepared(inputs, arrays, StepNoise(self.table.draws, source), tables)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call, complete; raises `RequestError` for those that a batcher lacks."""
    bound = _SIGNATURE.bind(None, **arguments)
    bound.apply_defaults()
    given = dict(bound.arguments)
    del given["self"]
    for name in ELSEWHERE:
        if given[name] != _SIGNATURE.parameters[name].default:
            raise RequestError(
                f"{name} is given: images of a batcher come and go by themselves; leave it out, or use pipe"
            )
    return given
