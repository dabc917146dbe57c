"""The way of one prompt: encode, table and noise, denoise, decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import Unpack

from ..engines.backends import Backend, open_backend
from ..engines.bundle import Bundle
from ..engines.device import Array
from ..engines.errors import RequestError, SchedulerError
from ..engines.progress import Progress, silent
from .batches import Batches
from .callbacks import BatchCallback, StepCallback, step_hook
from .finite import check_finite
from .loop.denoise import Mode
from .loop.inputs import InitialImage, load_pictures
from .loop.session import Session
from .pictures.load import image_pixels, latent_mask
from .request import GenerationRequest, RequestArguments
from .result import GenerationResult, Timings
from .sampling import step_table, takes_eta
from .sampling.step_table import StepTable
from .warm_up import warm_up

OutputType = Literal["pil", "np", "latent"]

MAX_TABLES = 32
"""Combinations of sampler, steps, strength and eta whose tables are kept."""


class Pipeline:
    """A bundle opened for generation; a context manager. Threads may share it: one request runs at a time."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        mode: Mode | None = None,
        max_batch: int = 4,
        low_memory: bool = False,
        memory_budget: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open all engines that every request needs; see `open`."""
        if mode not in (None, *get_args(Mode)):
            raise RequestError(f"mode is {mode!r}: choose {', '.join(get_args(Mode))}")
        if mode not in (None, "eager") and not backend.can_capture:
            raise RequestError(f"mode is {mode!r}: backend {backend.name} as opened cannot be captured; use eager")
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise RequestError(f"max_batch is {max_batch!r}: give the most pictures of a batch, 1 or more")
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
            raise RequestError(f"memory_budget is {memory_budget!r}: give bytes, 1 or more, or leave it out")
        self.bundle = bundle
        self.backend = backend
        self.mode: Mode = mode or ("step" if backend.can_capture else "eager")
        self.max_batch = max_batch
        self._batches = Batches(bundle)
        manifest = bundle.manifest
        self._table = lru_cache(MAX_TABLES)(partial(step_table, manifest.scheduler, rule=manifest.schedule))
        self.session = Session(bundle, backend, low_memory=low_memory, memory_budget=memory_budget, progress=progress)

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        *,
        mode: Mode | None = None,
        max_batch: int = 4,
        low_memory: bool = False,
        memory_budget: int | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle on a backend, building the engines that the cache does not have.

        `mode` says what is captured and replayed (default: steps, where the backend can). `max_batch` images are
        denoised together. `low_memory` opens a stage's engines when it begins and closes them when it ends.

        Buffers, engines and captures of the last 4 shapes of requests are kept, fewer while more than `memory_budget`
        bytes of the device's memory are in use: on a GPU, what is taken since it was opened (default: 3/4 of what is
        free then); on the CPU, what is resident (default: no bound). `options` go to the backend (`threads=`,
        `cache=`). Raises `BundleError`, `BackendUnavailableError` or `EngineError`.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(
            opened,
            open_backend(backend, progress=progress, **options),
            mode=mode,
            max_batch=max_batch,
            low_memory=low_memory,
            memory_budget=memory_budget,
            progress=progress,
        )

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = ...,
        *,
        output_type: Literal["pil"] = ...,
        **arguments: Unpack[RequestArguments],
    ) -> GenerationResult[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = ...,
        *,
        output_type: Literal["np", "latent"],
        **arguments: Unpack[RequestArguments],
    ) -> GenerationResult[npt.NDArray[np.float32]]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        on_batch: BatchCallback | None = None,
        keep_images: bool = True,
        progress: Progress = silent,
    ) -> GenerationResult[Any]:
        """Turn prompts into pictures.

        `image` (a path, PIL picture or array) starts from a picture, kept the more the lower `strength` is (default
        0.8); `mask_image` repaints only its white area (default strength 1). Sizes are pixels; `None` means the
        bundle's default. `callback_on_step_end(pipe, step, timestep, {"latents": array})` may return replaced latents,
        show `pipe.decode(latents)`, or raise to cancel; with it no more than a step is captured.
        `on_batch(request, first, images)` gets the pictures of each batch before the next batch starts; without
        `keep_images` they are let go after it, so that memory does not grow with the number of prompts. Raises
        `RequestError` for anything that cannot be served as given. A call waits for those of other threads.
        """
        start = time.perf_counter()
        if output_type not in get_args(OutputType):
            raise RequestError(f"output_type is {output_type!r}: choose pil, np or latent")
        picture, mask = load_pictures(image, mask_image, strength)
        request = GenerationRequest.of(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            sampler=sampler,
            eta=eta,
            strength=strength if strength is not None else 0.8 if picture and not mask else 1.0,
        )
        request = request.with_defaults(self.bundle.manifest, picture.size if picture else None)
        table = self._table_for(request, chosen=sampler is not None)
        finished: GenerationResult[Any] = GenerationResult(
            [], [seed for _, _, seed in request.images], Timings(), request=request
        )
        asked = (width, height)
        if picture is not None and any(
            given is None and own != drawn
            for given, own, drawn in zip(asked, picture.size, (request.width, request.height), strict=True)
        ):
            finished.warn(
                f"the initial picture is {picture.width}x{picture.height}: it is resized to "
                f"{request.width}x{request.height}, multiples of {self.bundle.manifest.latent.size_multiple}"
            )
        if request.eta and not takes_eta(request.sampler or "", self.bundle.manifest.scheduler):
            finished.warn(f"eta is {request.eta:g}: sampler {request.sampler} has no such option, it is not used")
        step = None if callback_on_step_end is None else partial(callback_on_step_end, self)
        if picture and not self.bundle.has_graph("image_encoder"):
            raise RequestError(f"bundle {self.bundle.path} has no image_encoder: it cannot start from a picture")
        with self.session.request():
            initial = None
            for batch in self._batches.split(request, table, self.session, self.max_batch, picture=bool(picture)):
                count = len(batch.images)
                if picture and initial is None:
                    initial = self._initial(request, picture, mask)
                inputs, arrays = self._batches.arrays(request, batch, table, initial, finished)
                workspace = self.session.workspace(inputs, arrays)
                workspace.load(inputs, arrays, self.session.stream)
                on_step = step_hook(workspace, table, self.session.stream, step, progress, count)
                decode = output_type != "latent"
                trace = workspace.run(len(table), self.session.stream, mode=self.mode, decode=decode, on_step=on_step)
                last = workspace.pictures[PICTURES[output_type]] if decode else workspace.loop.latents(len(table))
                output = last.read(self.session.stream)[:count]
                check_finite(workspace, len(table), output, decode, self.session.stream)
                finished.add(trace, len(table))
                pictures = list(map(Image.fromarray, output) if output_type == "pil" else output)
                if keep_images:
                    finished.images.extend(pictures)
                if on_batch is not None:
                    on_batch(request, batch.first, pictures)
        if output_type != "pil" and keep_images:
            finished.images = np.stack(finished.images)
        finished.timings.total = time.perf_counter() - start
        return finished

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the pictures of latents [B, C, h, w] as they are: a preview, inside a step's callback or outside."""
        latents = np.asarray(latents, np.float32)
        with self.session.turn():
            return [Image.fromarray(picture) for picture in self.session.decode(latents)]

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]] | None = None,
        batches: Sequence[int] = (1,),
        *,
        pictures: bool = True,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        strength: float | None = None,
    ) -> None:
        """Do what a first request would wait for, for every size (width, height) and batch: build, open, bind, capture.

        With `pictures`, also requests that start from a picture or show previews. Every shape that fits the memory
        budget is kept from then on. Other samplers, numbers of steps or guidance scales may have other shapes: call it
        for each that is served. Raises as a request does.
        """
        latent = self.bundle.manifest.latent
        arguments = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "eta": eta,
            "strength": strength,
        }
        warm_up(self, sizes or [(latent.default_width, latent.default_height)], batches, pictures, arguments)

    def _initial(self, request: GenerationRequest, picture: Image.Image, mask: Image.Image | None) -> InitialImage:
        """Encode the initial picture to latent moments, and bring the mask to latent size."""
        height, width = request.height or 0, request.width or 0
        moments = self.session.encode_picture(image_pixels(picture, height, width)[None])
        cells = None if mask is None else latent_mask(mask, height, width, self.bundle.manifest.latent.downscale)
        return InitialImage(moments["latents_mean"], moments["latents_std"], cells)

    def _table_for(self, request: GenerationRequest, chosen: bool) -> StepTable:
        """Return the step table; a scheduler that cannot be one is the request's fault when the request chose it."""
        size = (request.width or 0, request.height or 0) if self.bundle.manifest.schedule else None
        try:
            chosen_by = {"sampler": request.sampler, "strength": request.strength, "eta": request.eta}
            return self._table(request.num_inference_steps or 1, size=size, **chosen_by)
        except SchedulerError as error:
            raise (RequestError(str(error)) if chosen else error) from error

    def close(self) -> None:
        """Free all engines and memory, once a request of another thread is done; calling it again does nothing."""
        self.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pipeline({str(self.bundle.path)!r}, backend={self.backend.name!r}, mode={self.mode!r})"


PICTURES = {"pil": "image", "np": "pixels"}
"""The decoder's output for each type of picture."""
