"""A bundle on this machine against the PyTorch checkpoint it came from: each graph alone, then one whole request.

A graph is compared on inputs that both sides share, so its line is the error that this graph adds. The request compares
the latents after every step, where errors add up, and the picture at the end.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engines.backends import Backend, open_backend
from ..engines.bundle import Bundle, GraphInfo, LatentInfo
from ..engines.device import Array
from ..engines.errors import BundleError
from ..engines.files import sha256_of
from ..engines.progress import Progress, silent
from ..runtime.loop.hoisted import at_one_step, of_request, picks
from ..runtime.loop.workspace import run_once
from ..runtime.pipeline import Pipeline
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.configs import reading
from .checkpoints.sources import open_checkpoint
from .checkpoints.vae import with_tiny_decoder
from .compare import (
    Bounds,
    Report,
    RequestReport,
    TensorReport,
    compare,
    compare_requests,
    pictures_needed,
    told,
)
from .families import family_named
from .graph import Graph
from .reference import opened_by


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
    vae: str | Path | None = None,
    variant: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    tiny_decoder: str | Path | None = None,
    any_checkpoint: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Report:
    """Compare a bundle with its checkpoint at the bundle's default size; `options` go to the backend.

    The reference is the float32 checkpoint as diffusers' own loaders open it, in PyTorch on the CPU. A checkpoint whose
    files are not those that the bundle was exported from is refused unless `any_checkpoint` allows it. A hub id is
    opened at the `revision` that the bundle was exported from, unless another is given. Raises `BundleError` or
    `CheckpointError` when one of the two cannot be opened or they do not belong together.
    """
    opened = Bundle.open(bundle)
    if problems := opened.problems():  # engines in the cache would hide it
        name, problem = next(iter(problems.items()))
        raise BundleError(f"{bundle}: {name} {problem}: export it again")
    manifest = opened.manifest
    if revision is None and manifest.source.get("name") == str(base or source):
        revision = manifest.source.get("revision")
    checkpoint = open_checkpoint(
        source, revision, tokenizer=tokenizer, prediction_type=prediction_type, vae=vae, variant=variant, base=base
    )
    family = family_named(checkpoint.family)
    checkpoint = with_tiny_decoder(checkpoint, tiny_decoder, variant, manifest.latent)
    if not any_checkpoint:
        check_source(opened, checkpoint)
    skipped = manifest.guidance.skipped
    checkpoint = replace(checkpoint, skip_layers=skipped.layers if skipped else ())
    family.check(checkpoint)
    engines = open_backend(backend, **options)
    bounds = Bounds(manifest, options=options)
    report = Report(str(opened.path), engines.name, manifest.precision, "PyTorch fp32", told(manifest, options))
    if len(checkpoint.tokenizers) != len(manifest.tokenizers):
        raise BundleError(
            f"bundle {opened.path} has {len(manifest.tokenizers)} tokenizers and {checkpoint.name!r} has "
            f"{len(checkpoint.tokenizers)}: give the checkpoint that it came from"
        )
    lengths = dict(zip(checkpoint.tokenizers, (info.max_length for info in manifest.tokenizers), strict=True))
    pipeline = family.pipeline(checkpoint)
    builders = family.graphs(opened_by(pipeline, checkpoint), manifest.precision, lengths)
    for number, (name, build) in enumerate(builders.items()):
        progress(name.replace("_", " "), number, len(builders) + 1)
        report.tensors += _compare_graph(opened, engines, build(), bounds.error(name))
    progress("request", len(builders), len(builders) + 1)
    with Pipeline(opened, engines) as pipe:
        report.request = _compare_request(pipe, pipeline, prompt, steps, seed, bounds.psnr())
    return report


@reading("the checkpoint")
def check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise `BundleError` when a bundle was exported from other weight files than a checkpoint's."""
    source = bundle.manifest.source
    hashes = source.get("files")
    hashes = hashes if isinstance(hashes, dict) else {}
    replaced = source.get("replaced")
    for component, origin in replaced.items() if isinstance(replaced, dict) else ():
        if component not in checkpoint.replaced:
            name = origin.get("name") if isinstance(origin, dict) else origin
            raise BundleError(
                f"bundle {bundle.path} was exported with {component} {name!r} in place of the checkpoint's own: give "
                f"it with --{component}, or compare them anyway with --any-checkpoint"
            )
    if "tiny_decoder" in source and checkpoint.tiny_decoder is None:
        raise BundleError(
            f"bundle {bundle.path} was exported with a tiny decoder: give the same with --tiny-decoder, or compare the "
            "rest with --any-checkpoint"
        )
    for name, file in checkpoint.files.items():
        if name not in hashes or sha256_of(file) != hashes[name]:
            raise BundleError(
                f"bundle {bundle.path} was exported from {source.get('name')!r}, and {name} of {checkpoint.name!r} is "
                "none of its files: give the checkpoint that it came from, or compare them anyway with --any-checkpoint"
            )


@torch.no_grad()
def _compare_graph(bundle: Bundle, backend: Backend, graph: Graph, bound: float) -> list[TensorReport]:
    """Run one graph and its float32 module on the same random inputs at the bundle's default size."""
    info, latent = bundle.graph(graph.name), bundle.manifest.latent
    before = [*of_request(bundle.manifest), *picks(bundle.manifest)] if graph.name == "denoiser" else []
    known = {"R": 2, "h": latent.default_height // latent.downscale, "w": latent.default_width // latent.downscale}
    sizes = [{**known, **graph.usual}.get(letter, 1) for letter in graph.symbols]
    inputs = graph.random_inputs(sizes, seed=0)
    declared = {"inputs": (info.inputs, graph.inputs), "outputs": (info.outputs, graph.outputs)}
    if before:  # each of its parts reads some of the inputs
        read = {spec.name: spec for part in (info, *before) for spec in part.inputs}
        declared["inputs"] = tuple(read.get(spec.name, spec) for spec in graph.inputs), graph.inputs
    for what, (theirs, ours) in declared.items():
        if theirs != ours:
            raise BundleError(
                f"graph {info.name} of {bundle.path} has other {what} than the checkpoint's: "
                "give the checkpoint that it came from, or export again"
            )
    outputs = {name: value.numpy() for name, value in inputs.items()}
    outputs |= at_one_step(outputs["timestep"]) if before else {}
    for part in (*before, info):
        outputs |= run_graph(bundle, backend, part, {spec.name: outputs[spec.name] for spec in part.inputs})
    expected = graph.module(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    return [
        compare(f"{graph.name}.{spec.name}", outputs[spec.name], value.numpy(), bound)
        for spec, value in zip(graph.outputs, expected, strict=True)
    ]


def run_graph(bundle: Bundle, backend: Backend, info: GraphInfo, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one graph of a bundle once and return its outputs on the host."""
    stream = backend.device.stream()
    engine = backend.open(bundle, info, {name: array.shape for name, array in inputs.items()})
    try:
        return run_once(backend.device, engine, info, inputs, stream)
    finally:
        engine.close()
        stream.close()


def _compare_request(pipe: Pipeline, reference: Any, prompt: str, steps: int, seed: int, bound: float) -> RequestReport:
    ours: list[Array] = []

    def keep(_: Pipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        ours.append(values["latents"])

    starts = "Img2Img" in type(reference).__name__
    request = {"prompt": prompt, "num_inference_steps": steps, **pictures_needed(pipe.bundle.manifest, starts=starts)}
    result = pipe(**request, seed=seed, callback_on_step_end=keep)
    theirs, picture = _reference(pipe, reference, request, seed)
    pixels = np.stack([np.asarray(image) for image in result.images])
    return compare_requests((ours, theirs), (pixels, picture), bound)


@torch.no_grad()
def _reference(pipe: Pipeline, reference: Any, request: dict[str, Any], seed: int) -> tuple[list[Array], Array]:
    """Run the same request in diffusers' pipeline and return the latents after each step and the uint8 picture."""
    manifest = pipe.bundle.manifest
    reference.set_progress_bar_config(disable=True)
    latents: list[Array] = []

    def keep(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(_as_picture(values["latents"], manifest.latent).numpy().copy())
        return values

    size = {"height": manifest.latent.default_height, "width": manifest.latent.default_width}
    taken = inspect.signature(reference.__call__).parameters  # pipelines that start from a picture have its size
    images = reference(
        **request,
        **{name: pixels for name, pixels in size.items() if name in taken},
        guidance_scale=manifest.default_guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=keep,
        output_type="np",
    ).images
    return latents, (images * 255).round().astype(np.uint8)


def _as_picture(latents: torch.Tensor, info: LatentInfo) -> torch.Tensor:
    """Return latents [B, C, h, w] where a pipeline keeps tokens [B, S, n·n·C], squares of n·n cells."""
    if latents.ndim != 3:
        return latents
    side = math.isqrt(latents.shape[2] // info.channels)
    size = (info.default_height // info.downscale // side, info.default_width // info.downscale // side)
    return torch.nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, size), side)
