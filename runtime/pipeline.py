"""The way of one prompt: encode, table and noise, denoise, decode."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ..engines.backends import Backend, open_backend
from ..engines.bundle import Bundle, GraphInfo, Stage
from ..engines.device import Array
from ..engines.engine import Engine, Shapes
from ..engines.errors import EngineError, RequestError, SchedulerError
from ..engines.progress import Progress, silent
from .callbacks import BatchCallback, StepCallback, step_hook
from .loop.denoise import Mode
from .loop.inputs import InitialImage, load_pictures, loop_arrays
from .loop.workspace import Workspace, run_once
from .pictures.image import image_pixels, latent_mask
from .prompt.tokenizer import Tokenizer, encode_prompts
from .request import GenerationRequest
from .result import GenerationResult, Timings
from .sampling import step_table
from .sampling.step_table import StepTable

OutputType = Literal["pil", "np", "latent"]

MAX_WORKSPACES = 4
"""Request shapes whose buffers and captured graphs are kept; the least recently used goes first."""
MAX_TABLES = 32
"""Combinations of sampler, steps, strength and eta whose tables are kept."""


class Pipeline:
    """A bundle opened for generation; a context manager. One request at a time."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        mode: Mode | None = None,
        max_batch: int = 4,
        low_memory: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Open all engines that every request needs; see `open`."""
        if mode not in (None, "eager") and not backend.can_capture:
            raise RequestError(f"mode is {mode!r}: backend {backend.name} as opened cannot be captured; use eager")
        self.bundle = bundle
        self.backend = backend
        self.mode: Mode = mode or ("step" if backend.can_capture else "eager")
        self.max_batch = max_batch
        self.low_memory = low_memory
        self._closed = False
        self._tokenizers = [Tokenizer(bundle.file(info.file), info) for info in bundle.manifest.tokenizers]
        self._network_dtype = next(t.dtype for t in bundle.graph("denoiser").inputs if t.name == "model_input")
        self._stream = backend.device.stream()
        self._table = lru_cache(MAX_TABLES)(
            lambda steps, sampler, strength, eta: step_table(
                bundle.manifest.scheduler, steps, sampler=sampler, strength=strength, eta=eta
            )
        )
        self._workspaces: OrderedDict[Any, Workspace] = OrderedDict()
        self._engines: dict[tuple[str, Any], Engine] = {}
        graphs = [graph for graph in bundle.manifest.graphs if graph.stage != "image"]  # most start from noise
        for number, graph in enumerate(graphs if backend.dynamic and not low_memory else []):
            progress(f"opening {graph.name}", number, len(graphs))
            self._engine(graph, {})

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        *,
        mode: Mode | None = None,
        max_batch: int = 4,
        low_memory: bool = False,
        progress: Progress = silent,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle on a backend, building the engines that the cache does not have.

        `mode` says what is captured and replayed (default: steps, where the backend can). `max_batch` images are
        denoised together. `low_memory` opens a stage's engines when it begins and closes them when it ends. `options`
        go to the backend (`threads=`, `cache=`). Raises `BundleError`, `BackendUnavailableError` or `EngineError`.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(
            opened,
            open_backend(backend, progress=progress, **options),
            mode=mode,
            max_batch=max_batch,
            low_memory=low_memory,
            progress=progress,
        )

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
        progress: Progress = silent,
    ) -> GenerationResult:
        """Turn prompts into pictures.

        `image` (a path, PIL picture or array) starts from a picture, kept the more the lower `strength` is (default
        0.8); `mask_image` repaints only its white area (default strength 1). Sizes are pixels; `None` means the
        bundle's default. `callback_on_step_end(pipe, step, timestep, {"latents": array})` may return replaced latents,
        show `pipe.decode(latents)`, or raise to cancel; with it no more than a step is captured.
        `on_batch(request, first, images)` gets the pictures of each batch before the next batch starts. Raises
        `RequestError` for anything that cannot be served as given.
        """
        start = time.perf_counter()
        self._check_open()
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
        initial = self._initial(request, picture, mask) if picture else None
        finished = GenerationResult([], [seed for _, _, seed in request.images], Timings(), request=request)
        timings = finished.timings
        for first in range(0, len(request.images), self.max_batch):
            images = request.images[first : first + self.max_batch]
            began = time.perf_counter()
            token_ids = encode_prompts(self._tokenizers, images, request.branches, finished.warnings)
            tokenized = time.perf_counter()
            arrays = loop_arrays(
                table,
                [seed for _, _, seed in images],
                self._latent_shape(request),
                guidance_scale=request.guidance_scale or 0.0,
                branches=request.branches,
                network_dtype=self._network_dtype,
                initial=initial,
                repaint_all=mask is not None and request.strength == 1,
            )
            prepared = time.perf_counter()
            timings.tokenize += tokenized - began
            timings.prepare += prepared - tokenized
            workspace = self._workspace(token_ids, arrays)
            workspace.load(token_ids, arrays, self._stream)
            on_step = step_hook(self, workspace, table, self._stream, callback_on_step_end, progress)
            output = self._run(workspace, len(table), output_type, on_step, finished)
            finished.images.extend(map(Image.fromarray, output) if output_type == "pil" else output)
            if on_batch is not None:
                on_batch(request, first, finished.images[first:])
        if output_type != "pil":
            finished.images = np.stack(finished.images)
        timings.total = time.perf_counter() - start
        return finished

    def _run(
        self,
        workspace: Workspace,
        steps: int,
        output_type: OutputType,
        on_step: Callable[[int], None] | None,
        finished: GenerationResult,
    ) -> Array:
        """Encode, denoise and decode one loaded batch; the device is waited for once, at the end."""
        decode = output_type != "latent"
        trace = workspace.run(steps, self._stream, mode=self.mode, decode=decode, on_step=on_step)
        wanted = {"pil": "image", "np": "pixels"}
        output = workspace.pictures[wanted[output_type]] if decode else workspace.loop.latents(steps)
        array = output.read(self._stream)
        finished.add(trace, steps)
        return array

    def decode(self, latents: Array) -> list[Image.Image]:
        """Return the pictures of latents [B, C, h, w] as they are: a preview, inside a step's callback or outside.

        Every call binds the decoder anew, which on a GPU may take longer than running it.
        """
        self._check_open()
        latents = np.asarray(latents, np.float32)
        graph = self.bundle.graph("decoder")
        engine = self._engine(graph, {"latents": latents.shape})
        pixels = run_once(self.backend.device, engine, graph, {"latents": latents}, self._stream)["image"]
        if self.low_memory:
            self._release("end")
        return [Image.fromarray(picture) for picture in pixels]

    def _initial(self, request: GenerationRequest, picture: Image.Image, mask: Image.Image | None) -> InitialImage:
        """Encode the initial picture to latent moments, and bring the mask to latent size."""
        height, width = request.height or 0, request.width or 0
        if not self.bundle.has_graph("image_encoder"):
            raise RequestError(f"bundle {self.bundle.path} has no image_encoder: it cannot start from a picture")
        graph, pixels = self.bundle.graph("image_encoder"), image_pixels(picture, height, width)[None]
        engine = self._engine(graph, {"image": pixels.shape})
        moments = run_once(self.backend.device, engine, graph, {"image": pixels}, self._stream)
        if self.low_memory:
            self._release("image")
        cells = None if mask is None else latent_mask(mask, height, width, self.bundle.manifest.latent.downscale)
        return InitialImage(moments["latents_mean"], moments["latents_std"], cells)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the pipeline is closed: open it again")

    def _table_for(self, request: GenerationRequest, chosen: bool) -> StepTable:
        """Return the step table; a scheduler that cannot be one is the request's fault when the request chose it."""
        try:
            return self._table(request.num_inference_steps or 1, request.sampler, request.strength, request.eta)
        except SchedulerError as error:
            raise (RequestError(str(error)) if chosen else error) from error

    def token_ids(self, text: str) -> Array:
        """Return a prompt's token ids [1, L] for the first text encoder."""
        return self._tokenizers[0].encode(text).ids[None]

    def _latent_shape(self, request: GenerationRequest) -> tuple[int, int, int]:
        latent = self.bundle.manifest.latent
        return latent.channels, (request.height or 0) // latent.downscale, (request.width or 0) // latent.downscale

    def _engine(self, graph: GraphInfo, shapes: Shapes) -> Engine:
        fixed = () if self.backend.dynamic else tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
        key = (graph.name, fixed)
        if key not in self._engines:
            self._engines[key] = self.backend.open(self.bundle, graph, shapes)
        return self._engines[key]

    def _release(self, stage: Stage) -> None:
        names = {graph.name for graph in self.bundle.manifest.graphs if graph.stage == stage}
        for key in [key for key in self._engines if key[0] in names]:
            self._engines.pop(key).close()

    def _workspace(self, token_ids: dict[str, Array], arrays: dict[str, Array]) -> Workspace:
        key = tuple((name, array.shape) for name, array in {**token_ids, **arrays}.items())
        workspace = self._workspaces.pop(key, None)
        if workspace is None:
            if len(self._workspaces) >= MAX_WORKSPACES:
                self._workspaces.popitem(last=False)[1].close()
            release = self._release if self.low_memory else None
            workspace = Workspace(self.backend.device, self.bundle, self._engine, token_ids, arrays, release)
        self._workspaces[key] = workspace
        return workspace

    def close(self) -> None:
        """Free all engines and memory; calling it again does nothing."""
        for workspace in self._workspaces.values():
            workspace.close()
        for engine in self._engines.values():
            engine.close()
        self._workspaces.clear()
        self._engines.clear()
        self._stream.close()
        self._closed = True

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
