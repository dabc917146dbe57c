"""The way of one prompt: encode, table and noise, denoise, decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
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
from ..engines.errors import RequestError
from ..engines.progress import Progress, silent
from .arguments import RequestArguments
from .batches import Batches
from .call import Call, OutputType, legacy_callback
from .callbacks import BatchCallback, LegacyCallback, Listeners, StepCallback
from .drawing import Drawing
from .loop.decoding import DecoderName, checked_latents, decodings_of
from .loop.denoise import Mode
from .loop.session import Session
from .pretrained import bundle_of
from .prompt.syntax import PromptSyntax
from .request import short
from .result import GenerationResult
from .sizes import checked_sizes
from .warm_up import warm_up


class Pipeline(Drawing):
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
        prompt_cache: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open all engines that every request needs; see `open`."""
        if not isinstance(bundle, Bundle):
            raise RequestError(f"bundle is {short(bundle)}: give a Bundle, or its path to Pipeline.open")
        if not hasattr(backend, "can_capture"):
            raise RequestError(f"backend is {short(backend)}: give one that is open, or its name to Pipeline.open")
        if mode not in (None, *get_args(Mode)):
            raise RequestError(f"mode is {mode!r}: choose {', '.join(get_args(Mode))}")
        if mode not in (None, "eager") and not backend.can_capture:
            raise RequestError(f"mode is {mode!r}: backend {backend.name} as opened cannot be captured; use eager")
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise RequestError(f"max_batch is {max_batch!r}: give the most pictures of a batch, 1 or more")
        self.bundle = bundle
        self.backend = backend
        self.mode: Mode = mode or ("step" if backend.can_capture else "eager")
        self.max_batch = max_batch
        self._batches = Batches(bundle)
        self._use(bundle.manifest)
        kept = {"memory_budget": memory_budget, "prompt_cache": prompt_cache}
        self.session = Session(bundle, backend, low_memory=low_memory, progress=progress, **kept)

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
        prompt_cache: int | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle on a backend, building the engines that the cache does not have.

        `mode` says what is captured and replayed (default: steps, where the backend can). `max_batch` images are
        denoised together. `low_memory` opens a stage's engines when it begins and closes them when it ends.

        Buffers, engines and captures of the last 4 shapes of requests are kept, fewer while more than `memory_budget`
        bytes of the device's memory are in use: on a GPU, what is taken since it was opened (default: 3/4 of what is
        free then); on the CPU, what is resident (default: no bound). What prompts were encoded to is kept in up to
        `prompt_cache` bytes of the host's memory (default: 128 MiB; 0: never), so that for the same prompts again the
        text encoders do not run, nor open with `low_memory`; pictures are the same bit for bit. `options` go to the
        backend (`threads=`, `cache=`). Raises `BundleError`, `BackendUnavailableError` or `EngineError`.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(
            opened,
            open_backend(backend, progress=progress, **options),
            mode=mode,
            max_batch=max_batch,
            low_memory=low_memory,
            memory_budget=memory_budget,
            prompt_cache=prompt_cache,
            progress=progress,
        )

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, backend: str = "auto", progress: Progress = silent, **named: Any
    ) -> Pipeline:
        """Open a bundle, or a checkpoint (diffusers folder, hub id, file), which is exported into the cache first.

        For programs that change one import: `torch_dtype`, `variant`, `revision` and `safety_checker=None` mean what
        they mean in diffusers, `scheduler` is an object with a config, `vae` and `tokenizer` are names or folders, and
        what has no equivalent is refused. The others are those of `open`. Raises as `export_checkpoint` and `open` do.
        """
        scheduler = named.pop("scheduler", None)
        bundle, options = bundle_of(source, named, progress)
        pipe = cls.open(bundle, backend, progress=progress, **options)
        try:
            if scheduler is not None:
                pipe.scheduler = scheduler
        except BaseException:
            pipe.close()
            raise
        return pipe

    from_single_file = from_pretrained

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_dict: Literal[True] = ...,
        **arguments: Unpack[RequestArguments],
    ) -> GenerationResult[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        *,
        output_type: Literal["np", "latent"],
        return_dict: Literal[True] = ...,
        **arguments: Unpack[RequestArguments],
    ) -> GenerationResult[npt.NDArray[np.float32]]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        *,
        output_type: OutputType = ...,
        return_dict: Literal[False],
        **arguments: Unpack[RequestArguments],
    ) -> tuple[Any, None]: ...

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        prompt_syntax: PromptSyntax | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        forecast: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_reuse: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        padding_mask_crop: int | None = None,
        strength: float | None = None,
        decoder: DecoderName = "full",
        tiled: bool | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: LegacyCallback | None = None,
        callback_steps: int | None = None,
        on_batch: BatchCallback | None = None,
        keep_images: bool = True,
        progress: Progress = silent,
        **others: Any,
    ) -> GenerationResult[Any] | tuple[Any, None]:
        """Turn prompts into pictures.

        `image` (a path, PIL picture or array, or one for each image) starts from a picture, kept the more the lower
        `strength` is (default: the bundle's); `mask_image` repaints only its white area, and
        `padding_mask_crop` draws that part alone, with so many pixels around it, at the request's size. Sizes are
        pixels; `None` means the bundle's default. `seed` is that of the first image, and others follow it, or one for
        each; `generator` takes torch generators. `prompt_embeds` [prompts, L, E] stand in place of prompts, `latents`
        [images, C, h, w] in place of the first noise, `timesteps` or `sigmas` in place of a number of steps.
        `prompt_syntax` reads weights in prompts, and prompts of any length; without it a prompt is what it says.
        `forecast` ("taylor" or "spectrum") leaves out evaluations of the network in long runs, at a cost in fidelity;
        so do `guidance_interval` (shares of the run) and `guidance_reuse` (a share, from which on guidance is kept).
        `decoder` "tiny" is the small one of a bundle that has it; `tiled` decodes a large picture in tiles, so that
        memory does not grow with it (None: where there is no engine for it in one piece, and none may be built).

        `callback_on_step_end(pipe, step, timestep, {"latents": array})` may return replaced latents, show
        `pipe.decode(latents)`, end the request with `pipe.stop()`, or raise to cancel; with it no more than a step is
        captured. `on_batch(request, first, images)` gets the pictures of each batch before the next batch starts;
        without `keep_images` they are let go after it, so that memory does not grow with the number of prompts
        (with one torch generator for all of them it does: it draws their noise before the first step).
        `others` are arguments of diffusers that latentrt refuses, with the reason. Raises `RequestError` for anything
        that cannot be served as given. A call waits for those of other threads.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        start = time.perf_counter()
        call = Call.of(self.bundle, self._manifest, given)
        table, finished = self._begun(call, given, logged=True)
        request = call.request
        legacy = legacy_callback(callback, callback_steps, len(table), request, self._manifest.scheduler)
        step = None if callback_on_step_end is None else partial(self._heard, callback_on_step_end)
        listeners = Listeners(step, legacy, silent if progress is None else progress, lambda: self._interrupt)
        with self.session.request():
            self._guidance_scale, self._num_timesteps, self._interrupt = request.guidance_scale, len(table), False
            for first, pictures in self._draw(call, table, listeners, finished):
                if keep_images:
                    finished.images.extend(pictures)
                if on_batch is not None:
                    on_batch(request, first, pictures)
        if output_type != "pil" and keep_images:
            finished.images = np.stack(finished.images)
        finished.timings.total = time.perf_counter() - start
        return finished if return_dict else (finished.images, None)

    def decode(self, latents: Array, *, decoder: DecoderName = "full", tiled: bool | None = None) -> list[Image.Image]:
        """Return the pictures of latents [B, C, h, w] as they are: a preview, inside a step's callback or outside."""
        latents = checked_latents(self.bundle, latents)
        decoding = decodings_of(self.bundle, decoder, tiled, latents.shape[2:])[0]
        with self.session.turn():
            return [Image.fromarray(picture) for picture in self.session.decode(latents, decoding)]

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
        forecast: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_reuse: float | None = None,
        strength: float | None = None,
        decoder: DecoderName = "full",
        tiled: bool | None = None,
        **others: Any,
    ) -> None:
        """Do what a first request would wait for, for every size (width, height) and batch: build, open, bind, capture.

        With `pictures`, also requests that start from a picture or show previews. Every shape that fits the memory
        budget is kept from then on. Other samplers, numbers of steps or guidance may have other shapes: call it for
        each that is served. `others` are further arguments of a request. Raises as a request does.
        """
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        given |= {"guidance_interval": guidance_interval, "guidance_reuse": guidance_reuse}
        given |= {"sampler": sampler, "eta": eta, "forecast": forecast, "strength": strength}
        given |= {"decoder": decoder, "tiled": tiled, **others}
        warm_up(self, checked_sizes(sizes, self.bundle.manifest.latent), batches, pictures, given)

    def close(self) -> None:
        """Free all engines and memory, once a request of another thread is done; calling it again does nothing."""
        self.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pipeline({str(self.bundle.path)!r}, backend={self.backend.name!r}, mode={self.mode!r})"
