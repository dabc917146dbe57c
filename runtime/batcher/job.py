"""A request in a batcher: its images, which come and go by themselves, and the future of its result."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ...engines.errors import RequestError
from ..batches import Batch
from ..call import Call
from ..loop.inputs import InitialImage
from ..pipeline import Pipeline
from ..prompt.conditioning import WeightedPrompts
from ..prompt.embeddings import Conditioning
from ..result import GenerationResult
from ..sampling import takes_eta
from .policy import Candidate
from .prepared import Fit, Prepared, fit_of, prepared, region, table_names

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
    future: Future[GenerationResult[Any]] = field(default_factory=Future)
    images: list[Image] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)
    began: float | None = None
    """When its first image got a slot (`time.monotonic`), or None."""
    error: BaseException | None = None
    over: bool = False
    """Whether the rest of its images is to be dropped."""
    _prompts: WeightedPrompts | None = None
    _lengths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Pipeline, arguments: Mapping[str, Any], timeout: float | None) -> Job:
        """Check a request and prepare what needs no engine; raises as the pipeline's own call does."""
        began = time.monotonic()
        given = _given(arguments)
        call = Call.of(pipe.bundle, pipe._manifest, given)
        request, bundle = call.request, pipe.bundle
        chosen = any(given[name] is not None for name in ("sampler", "timesteps", "sigmas"))
        table = pipe._table_for(request, chosen=chosen)
        table = replace(table, init_noise_sigma=1.0) if call.started else table
        eta_taken = takes_eta(request.sampler or "", pipe._manifest.scheduler)
        finished = call.result((given["width"], given["height"]), eta_taken, pipe._manifest.latent.size_multiple)
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
        job = cls(pipe, call, table, fit, finished, began, due, _prompts=prompts, _lengths=lengths)
        rows = len(request.weights(pipe._manifest.guidance))
        job.images = [Image(job, i, Candidate(began, rows, len(table))) for i in range(len(request.images))]
        if call.pictures is None and conditioning is None:
            job._prepare(None, None)
        return job

    def end(self, error: BaseException | None = None) -> bool:
        """Note the end of the request, with the error that was its end, and tell whether it was not over before."""
        if self.over:
            return False
        self.over, self.error = True, error
        return True

    @property
    def work(self) -> int:
        """Network rows times evaluations that are still to be run."""
        left = (image for image in self.images if image.index not in self.outputs)
        return 0 if self.over else sum(i.candidate.rows * (i.candidate.evaluations - i.done) for i in left)

    def prepare(self) -> None:
        """Encode pictures and prompts that need it, and prepare the images; on the thread that holds the session."""
        if all(image.prepared is not None for image in self.images):
            return
        conditioning, request = None, self.call.request
        if self._prompts is not None:
            conditioning = self.pipe._weighted(self._prompts, self.call, 1, self.finished)
        elif self.call.embeddings is not None:
            conditioning = self.pipe._conditioning(self.call.embeddings, request)
        pictures = self.call.pictures
        self._prepare(self.pipe._initial(request, pictures) if pictures else None, conditioning)

    def _prepare(self, initial: InitialImage | None, conditioning: Conditioning | None) -> None:
        """Draw for every image, and lay out its arrays."""
        batches = copy.copy(self.pipe._batches)  # it remembers noise that is drawn for a whole request
        call, tables = self.call, None
        for image in self.images:
            inputs, arrays = batches.arrays(
                call.request,
                Batch(image.index, [call.request.images[image.index]], 1, self._lengths),
                self.table,
                initial,
                self.finished,
                noise=call.noise,
                latents=call.latents,
                conditioning=conditioning,
            )
            tables = tables or region(arrays, table_names(self.pipe.bundle), len(self.table) + 1, self.fit)
            image.prepared = prepared(inputs, arrays, self.table, tables)


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
