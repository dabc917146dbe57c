"""A bundle on this machine against the PyTorch checkpoint it came from: each graph alone, then one whole request.

A graph is compared on inputs that both sides share, so its line is the error that this graph adds. The request compares
the latents after every step, where errors add up, and the picture at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmarks.quality.fidelity import psnr, relative_error, ssim
from ..engines.backends import Backend, open_backend
from ..engines.bundle import Bundle, GraphInfo, Precision
from ..engines.device import Array
from ..engines.errors import BundleError
from ..engines.progress import Progress, silent
from ..runtime.loop.workspace import run_once
from ..runtime.pipeline import Pipeline
from .checkpoint import Checkpoint
from .exporter import graph_builders
from .graph import Graph
from .sources import open_checkpoint

GRAPH_BOUND: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest relative error of one graph's output."""

PSNR_BOUND: Mapping[Precision, float] = {"fp32": 45.0, "fp16": 35.0}
"""Smallest peak signal-to-noise ratio of the picture, in decibels."""


@dataclass(frozen=True)
class TensorReport:
    """One output of one graph against PyTorch, on shared random inputs."""

    tensor: str
    max_abs_error: float
    relative_error: float
    cosine: float
    nan_count: int
    bound: float

    @property
    def within(self) -> bool:
        """Whether the output is finite and inside its bound."""
        return self.nan_count == 0 and self.relative_error <= self.bound


@dataclass(frozen=True)
class RequestReport:
    """One request against diffusers: relative error of the latents after each step, and the picture."""

    steps: list[float]
    max_pixel_difference: int
    psnr: float | None
    ssim: float
    nan_count: int
    bound: float

    @property
    def within(self) -> bool:
        """Whether everything is finite and the picture is inside its bound."""
        return self.nan_count == 0 and (self.psnr is None or self.psnr >= self.bound)


@dataclass
class Report:
    """What `verify` found."""

    bundle: str
    backend: str
    precision: str
    tensors: list[TensorReport] = field(default_factory=list)
    request: RequestReport | None = None

    @property
    def within(self) -> bool:
        """Whether every line is inside its bound."""
        return all(t.within for t in self.tensors) and (self.request is None or self.request.within)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "within": self.within}


def verify(
    bundle: str | Path,
    source: str | Path,
    *,
    backend: str = "auto",
    prompt: str = "a photo of an astronaut riding a horse",
    steps: int = 10,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Report:
    """Compare a bundle with its checkpoint at the bundle's default size; `options` go to the backend.

    The reference is the float32 checkpoint in PyTorch on the CPU, with diffusers' own scheduler. Raises `BundleError`
    or `CheckpointError` when one of the two cannot be opened.
    """
    opened = Bundle.open(bundle)
    if problems := opened.problems():  # engines in the cache would hide it
        name, problem = next(iter(problems.items()))
        raise BundleError(f"{bundle}: {name} {problem}: export it again")
    checkpoint = open_checkpoint(source, tokenizer=tokenizer, prediction_type=prediction_type)
    checkpoint.check()
    manifest = opened.manifest
    engines = open_backend(backend, **options)
    report = Report(str(opened.path), engines.name, manifest.precision)
    builders = graph_builders(checkpoint, manifest.tokenizers[0].max_length, manifest.precision)
    for number, (name, build) in enumerate(builders.items()):
        progress(name, number, len(builders) + 1)
        graph = build()
        report.tensors += _compare_graph(opened, engines, graph)
    progress("request", len(builders), len(builders) + 1)
    with Pipeline(opened, engines) as pipe:
        report.request = _compare_request(pipe, checkpoint, prompt, steps, seed)
    return report


@torch.no_grad()
def _compare_graph(bundle: Bundle, backend: Backend, graph: Graph) -> list[TensorReport]:
    """Run one graph and its float32 module on the same random inputs at the bundle's default size."""
    info, latent = bundle.graph(graph.name), bundle.manifest.latent
    cells = {"h": latent.default_height // latent.downscale, "w": latent.default_width // latent.downscale}
    sizes = [cells.get(s, 2 if s == "R" else 1) // graph.multiples.get(s, 1) for s in graph.symbols]
    inputs = graph.random_inputs(sizes, seed=0)
    outputs = run_graph(bundle, backend, info, {name: value.numpy() for name, value in inputs.items()})
    expected = graph.module(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    bound = GRAPH_BOUND[bundle.manifest.precision]
    return [
        compare(f"{graph.name}.{spec.name}", outputs[spec.name], value.numpy(), bound)
        for spec, value in zip(graph.outputs, expected, strict=True)
    ]


def compare(name: str, values: Array, reference: Array, bound: float) -> TensorReport:
    """Return how far one tensor is from its reference."""
    a, b = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return TensorReport(
        tensor=name,
        max_abs_error=float(np.abs(a - b).max()),
        relative_error=relative_error(a, b),
        cosine=float(a @ b / norm) if norm else float(np.array_equal(a, b)),
        nan_count=int((~np.isfinite(a)).sum()),
        bound=bound,
    )


def run_graph(bundle: Bundle, backend: Backend, info: GraphInfo, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one graph of a bundle once and return its outputs on the host."""
    if missing := {t.name for t in info.inputs} ^ set(inputs):
        raise BundleError(f"graph {info.name} and the checkpoint disagree on {sorted(missing)}: export again")
    stream = backend.device.stream()
    engine = backend.open(bundle, info, {name: array.shape for name, array in inputs.items()})
    try:
        return run_once(backend.device, engine, info, inputs, stream)
    finally:
        engine.close()
        stream.close()


def _compare_request(pipe: Pipeline, checkpoint: Checkpoint, prompt: str, steps: int, seed: int) -> RequestReport:
    ours: list[Array] = []

    def keep(_: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        ours.append(values["latents"])

    result = pipe(prompt, num_inference_steps=steps, seed=seed, callback_on_step_end=keep)
    theirs, picture = _reference(pipe, checkpoint, prompt, steps, seed)
    pixels = np.stack([np.asarray(image) for image in result.images])
    return RequestReport(
        steps=[relative_error(a, b) for a, b in zip(ours, theirs, strict=True)],
        max_pixel_difference=int(np.abs(pixels.astype(np.int16) - picture).max()),
        psnr=psnr(pixels, picture),
        ssim=ssim(pixels[0], picture[0]),
        nan_count=int(sum((~np.isfinite(latents)).sum() for latents in ours)),
        bound=PSNR_BOUND[pipe.bundle.manifest.precision],
    )


@torch.no_grad()
def _reference(pipe: Pipeline, checkpoint: Checkpoint, prompt: str, steps: int, seed: int) -> tuple[list[Array], Array]:
    """Run the same request in diffusers and return the latents after each step and the uint8 picture."""
    import diffusers

    manifest = pipe.bundle.manifest
    encoder = checkpoint.load_text_encoder()
    ids = [torch.from_numpy(pipe.token_ids(text)) for text in (prompt, "")]
    positive, negative = (encoder(row, return_dict=False)[0] for row in ids)
    scheduler = getattr(diffusers, checkpoint.scheduler["_class_name"]).from_config(dict(checkpoint.scheduler))
    reference = diffusers.StableDiffusionPipeline(
        vae=checkpoint.load_vae(),
        text_encoder=encoder,
        tokenizer=None,
        unet=checkpoint.load_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    latents: list[Array] = []

    def keep(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return values

    images = reference(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=manifest.latent.default_height,
        width=manifest.latent.default_width,
        num_inference_steps=steps,
        guidance_scale=manifest.default_guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=keep,
        output_type="np",
    ).images
    return latents, (images * 255).round().astype(np.uint8)
