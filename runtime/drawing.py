"""The drawing of a call: embeddings and pictures encoded, then batch after batch denoised and decoded."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image

from ..engines.bundle import Bundle, Manifest
from ..engines.device import Array
from ..engines.errors import RequestError, SchedulerError
from .batches import Batch, Batches, options_of_bundle
from .call import Call, calls_of_a_step
from .callbacks import Listeners, StepCallback, StepValues, step_hook
from .finite import check_finite, check_pixels
from .habits import DiffusersHabits, SchedulerConfig
from .loop.decoding import NO_WHOLE, Decoding
from .loop.denoise import Mode
from .loop.forecast import folded, forecast_named
from .loop.guidance import ALL, NOTHING, GuidedPart, SkippedPart, guided_in_part, with_skipped_layers
from .loop.inputs import InitialImage
from .loop.session import Session
from .loop.workspace import Trace, Workspace
from .pictures.initial import Pictures
from .pictures.load import image_pixels, latent_mask, pixel_mask
from .prompt.conditioning import WeightedPrompts
from .prompt.embeddings import Conditioning, Embeddings, Read, conditioning_tensors
from .prompt.numbers import number_inputs
from .request import GenerationRequest
from .result import GenerationResult
from .sampling import step_table, takes_eta
from .sampling.registry import TYPICAL_STEPS
from .sampling.step_table import StepOption, StepTable

MAX_TABLES = 32
"""Combinations of sampler, steps, strength and eta whose tables are kept."""

INSTEAD: Mapping[StepOption, str] = {
    "dynamic thresholding": "set thresholding to false",
    "learned variance": "set variance_type to 'fixed_small' or choose ddim, which has none",
}
"""What works on a bundle whose step graph lacks an option."""

PICTURES = {"pil": "image", "np": "pixels"}
"""The decoder's output for each type of picture."""


class Drawing(DiffusersHabits):
    """The part of a pipeline that draws."""

    bundle: Bundle
    session: Session
    mode: Mode
    max_batch: int
    _batches: Batches

    @property
    def scheduler(self) -> Any:
        """What stands for diffusers' scheduler: an object whose `config` another scheduler can be made from.

        Setting it replaces the bundle's own scheduler for the requests that follow, by the class and `config` of the
        new one, as diffusers does; it is not otherwise used. Raises `RequestError` for one that no step table holds.
        """
        return SchedulerConfig(dict(self._manifest.scheduler))

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        config = getattr(scheduler, "config", None)
        if not isinstance(config, Mapping):
            raise RequestError(
                f"scheduler is a {type(scheduler).__name__}: give an object with a config, such as "
                "X.from_config(pipe.scheduler.config), or sampler= in the call"
            )
        config = {**config, "_class_name": config.get("_class_name") or type(scheduler).__name__}
        latent, changed = self._manifest.latent, self._manifest.model_copy(update={"scheduler": config})
        try:
            self._table_of(changed, TYPICAL_STEPS, size=(latent.default_width, latent.default_height))
        except SchedulerError as error:
            raise RequestError(f"scheduler cannot be used: {error}") from error
        self._use(changed)

    def _use(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._table = lru_cache(MAX_TABLES)(partial(self._table_of, manifest))

    def _begun(
        self, call: Call, given: Mapping[str, Any], *, logged: bool = False
    ) -> tuple[StepTable, GenerationResult[Any]]:
        """Return the step table of a call of some arguments, and its empty result, with what to know about both."""
        request, manifest = call.request, self._manifest
        table = self._table_for(request, any(given[name] is not None for name in ("sampler", "timesteps", "sigmas")))
        table = replace(table, init_noise_sigma=1.0) if call.started else table
        eta_taken, asked = takes_eta(request.sampler or "", manifest.scheduler), (given["width"], given["height"])
        finished = call.result(asked, eta_taken, manifest.latent.size_multiple, table, logged=logged)
        if request.forecast is not None:
            whole = self._table_for(request.model_copy(update={"forecast": None}), chosen=True)
            if len(table) == len(whole):
                what = f"forecast {request.forecast} leaves nothing out of {len(table)} evaluations"
                finished.warn(f"{what}: it changes nothing")
        return table, finished

    def check(self, prompt: Any, **named: Any) -> None:
        """Raise what a call with these arguments would before an engine runs."""
        call = inspect.signature(type(self).__call__).bind(self, prompt, **named)
        call.apply_defaults()
        self._begun(Call.of(self.bundle, self._manifest, call.arguments), call.arguments)

    def _table_for(self, request: GenerationRequest, chosen: bool) -> StepTable:
        """Return the step table; a scheduler that cannot be one is the request's fault when the request chose it."""
        size = (request.width or 0, request.height or 0) if self._manifest.schedule else None
        try:
            chosen_by = {"sampler": request.sampler, "strength": request.strength, "eta": request.eta}
            custom: dict[str, Any] = {"timesteps": request.timesteps, "sigmas": request.sigmas}
            steps = None if any(custom.values()) else request.num_inference_steps
            share = (request.denoising_start or 0.0, request.denoising_end or 1.0)
            guidance = self._manifest.guidance
            parts = {"guided": request.guided_part(guidance), "skipped": request.skipped_part(guidance)}
            custom |= {"forecast": request.forecast, **parts}
            return self._table(steps, size=size, share=share, **custom, **chosen_by)
        except SchedulerError as error:
            raise (RequestError(str(error)) if chosen else error) from error

    def _table_of(
        self,
        manifest: Manifest,
        steps: int | None,
        *,
        forecast: str | None = None,
        guided: GuidedPart = ALL,
        skipped: SkippedPart = NOTHING,
        **arguments: Any,
    ) -> StepTable:
        """Return a step table; raises `SchedulerError` for one that needs more than the bundle's step graph does."""
        table = step_table(manifest.scheduler, steps, rule=manifest.schedule, **arguments)
        has = options_of_bundle(self.bundle)
        if missing := [option for option in table.options if option not in has]:
            name = arguments.get("sampler") or manifest.scheduler.get("_class_name")
            raise SchedulerError(
                f"{name} with this scheduler config needs {' and '.join(missing)}, which the step graph of this bundle "
                f"lacks: {' and '.join(INSTEAD[option] for option in missing)}, or export the checkpoint again with it"
            )
        table = guided_in_part(table, guided)
        if skipped != NOTHING:
            table = with_skipped_layers(table, skipped, calls_of_a_step(arguments["sampler"], manifest.scheduler))
        return table if forecast is None else folded(table, forecast_named(forecast))

    def _draw(
        self, call: Call, table: StepTable, listeners: Listeners, finished: GenerationResult[Any]
    ) -> Iterator[tuple[int, list[Any]]]:
        """Draw batch after batch, and yield each one's first index and images; end early when told to."""
        request, stream, conditioning = call.request, self.session.stream, None
        if call.embeddings is not None:
            conditioning = self._conditioning(call.embeddings, request, finished)
        prompts = None
        if request.prompt_syntax is not None:
            prompts = WeightedPrompts(self.bundle, request, self._batches.tokenizers)
            conditioning = prompts.blank
        batches = self._batches.split(
            request,
            table,
            self.session,
            self.max_batch,
            picture=bool(call.pictures),
            conditioning=conditioning,
            decodings=call.decodings,
        )
        initial = together = None
        for batch in batches:
            count = len(batch.images)
            if prompts is not None and conditioning is prompts.blank:
                rows = batch.rows * (len(request.weights(self._manifest.guidance)) + table.skips)
                conditioning = self._weighted(prompts, call, rows, finished)
            if batch.first == 0:
                initial = self._initial(request, call.pictures) if call.pictures else None
                together = self._batches.together(request, table, call.noise, initial, call.latents, finished)
            inputs, arrays = self._batches.arrays(
                request,
                batch,
                table,
                initial,
                finished,
                noise=call.noise,
                together=together,
                latents=call.latents,
                conditioning=conditioning,
            )
            workspace = self.session.workspace(inputs, arrays, batch.decoding)
            known = self.session.prompts.get(inputs)
            branches = len(request.weights(self._manifest.guidance))
            workspace.load(inputs, arrays, stream, known, table.asked(branches))
            on_step = step_hook(workspace, table, stream, listeners, count, self.mode)
            decode = call.output_type != "latent" and batch.decoding.tile is None
            trace = workspace.run(len(table), stream, mode=self.mode, decode=decode, on_step=on_step)
            output = self._output(call, batch, workspace, trace, finished)
            if known is None and conditioning is None and self.session.prompts.on:
                self.session.prompts.put(inputs, workspace.encoded(self.session.prompts.names, stream))
            if call.output_type == "pil":
                drawn = [Image.fromarray(each) for each in output]
                yield batch.first, [call.pictures.put_back(each) for each in drawn] if call.pictures else drawn
            else:
                yield batch.first, list(output)
            if self._interrupt:
                return

    def _output(
        self, call: Call, batch: Batch, workspace: Workspace, trace: Trace, finished: GenerationResult[Any]
    ) -> Array:
        """Return what a batch gave, as its request wants it, and note what it took."""
        stream, in_tiles = self.session.stream, batch.decoding.tile is not None
        decode = call.output_type != "latent" and not in_tiles
        last = workspace.pictures[PICTURES[call.output_type]] if decode else workspace.loop.latents(trace.steps)
        output = last.read(stream)[: len(batch.images)]
        check_finite(workspace, trace.steps, output, decode, stream)
        finished.add(trace, trace.steps)
        if call.output_type == "latent" or not in_tiles:
            return output
        return self._in_tiles(output, call, batch.decoding, finished)

    def _in_tiles(self, latents: Array, call: Call, decoding: Decoding, finished: GenerationResult[Any]) -> Array:
        """Return the pictures of latents that are decoded in tiles, and note what it took, and why where none asked."""
        began = time.perf_counter()
        if not call.request.tiled:
            finished.warn(NO_WHOLE.format(call.request.width, call.request.height))
        decoded = self.session.decode_in_tiles(latents, decoding)
        check_pixels(decoded["pixels"])
        finished.timings.decode += time.perf_counter() - began
        taken = self.session.backend.device.bytes_taken()
        finished.memory["decode"] = max(taken, finished.memory.get("decode", 0))
        return decoded[PICTURES[call.output_type]]

    def _heard(self, callback: StepCallback, step: int, timestep: float, values: StepValues) -> StepValues | None:
        """Call a step's callback; raises `RequestError` when it has changed what only the next request can change."""
        before = self._guidance_scale
        returned = callback(self, step, timestep, values)
        if self._guidance_scale != before:
            self._guidance_scale = before
            raise RequestError(
                "callback_on_step_end changed _guidance_scale: it is fixed for a request, give guidance_scale"
            )
        return returned

    def _conditioning(
        self, embeddings: Embeddings, request: GenerationRequest, finished: GenerationResult[Any]
    ) -> Conditioning:
        """Return the conditioning of a request of which embeddings were given, and encode what was given as text."""
        specs = conditioning_tensors(self.bundle)

        def encode(prompt: Read, negative: bool) -> Mapping[str, Array]:
            numbers = number_inputs(self.bundle, request, int(not negative), int(negative))
            tokens = self._batches.tokens(*prompt, length=request.max_sequence_length, warn=finished.warn)
            encoded = self.session.encode_prompt({**tokens, **numbers})
            return {spec.name: encoded[spec.name] for spec in specs}

        prompts, negatives = (self._batches.read(request, negative=side) for side in (False, True))
        images = request.num_images_per_prompt
        guided = len(request.weights(self._manifest.guidance)) == 2
        return embeddings.conditioning(specs, prompts, negatives, images, encode, guided=guided)

    def _weighted(
        self, prompts: WeightedPrompts, call: Call, rows: int, finished: GenerationResult[Any]
    ) -> Conditioning:
        """Return the conditioning of prompts with weights or more than one part, encoded so many rows at a time."""
        began = time.perf_counter()
        numbers = number_inputs(self.bundle, call.request, rows)
        conditioning = prompts.conditioning(rows, lambda ids: self.session.encode_prompt({**ids, **numbers}))
        finished.timings.encode += time.perf_counter() - began
        return conditioning

    def _initial(self, request: GenerationRequest, pictures: Pictures) -> InitialImage:
        """Encode the initial pictures to latent moments, one by one, and bring the masks to latent size."""
        height, width, downscale = request.height or 0, request.width or 0, self.bundle.manifest.latent.downscale
        cut = pictures.cut(width, height)
        pixels = [image_pixels(image, height, width)[None] for image in cut.images]
        mean, std = self._moments([(each, None) for each in pixels])
        if not cut.masks:
            return InitialImage(mean, std)
        mask = np.concatenate([latent_mask(each, height, width, downscale) for each in cut.masks])
        masked = None
        if self._manifest.masked_input is not None:
            masks = [pixel_mask(each, height, width) for each in cut.masks]
            both = range(max(len(pixels), len(masks)))
            masked = self._moments([(pixels[i % len(pixels)], masks[i % len(masks)]) for i in both])
        return InitialImage(mean, std, mask, masked)

    def _moments(self, pictures: Sequence[tuple[Array, Array | None]]) -> tuple[Array, Array]:
        """Return mean and deviation of the latents of pictures [1, H, W, 3], which are gray where a mask is true."""
        encoded = [self.session.encode_picture(*picture) for picture in pictures]
        mean, std = (np.concatenate([each[name] for each in encoded]) for name in ("latents_mean", "latents_std"))
        return mean, std
