"""`latentrt build`: engines ahead of the first request, for this machine or for another GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.backends import Backend, open_backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.cache import EngineCache
from ...engines.engine import Shapes
from ...engines.errors import BackendUnavailableError, RequestError
from ...engines.onnxruntime.cpu import OnnxRuntimeCpu
from ...engines.openvino.backend import OpenVino
from ...engines.progress import Progress
from ...engines.tensorrt.backend import TensorRt, plan_options
from ...engines.tensorrt.plan import Profile, profile_for
from ...engines.tensorrt.planner import Planner, target_of_compute_capability
from ..loop.widths import buckets_of, check_numbers, rows_of
from ..pipeline import Pipeline
from ..shapes import batcher_shapes, requested_shapes, row_lengths_for
from ..sizes import size_of
from ..warm_up import guided_requests
from .bundle import readable_size
from .options import BackendOptions, backend_options, check_backend, opened_bundle, options_of
from .progress import progress_bar

_Prompt = tuple[int, int | None]  # its parts, and its tokens


def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    backend: Annotated[str, typer.Option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Pictures denoised together; may be repeated.")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="One engine for all sizes and batches between those given (slower).")
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            metavar="X.Y",
            help="Build tensorrt-rtx engines for this GPU architecture; no GPU needed.",
        ),
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(
            "--guidance", "-g", min=0, help="Guidance scale to be used; may be repeated (default: the bundle's, and 1)."
        ),
    ] = None,
    prompt_parts: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt-parts", min=1, max=100, help="Parts of 75 tokens that prompts have; may be repeated (default: 1)."
        ),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt-tokens",
            min=1,
            help="Tokens that prompts have, or max_sequence_length, where a bundle takes several lengths; may be "
            "repeated (default: the most).",
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Build what a server with so many slots needs, no batches.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="Network rows of that server.")] = None,
    fixed_rows: Annotated[bool, typer.Option("--fixed-rows", help="For a server with --fixed-rows.")] = False,
    warm: Annotated[
        bool,
        typer.Option("--warm", help="Then draw once with each size, batch and guidance, to see that engines work."),
    ] = False,
    options: BackendOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a bundle's engines into the cache, so that the first request need not wait for it.

    They serve every sampler and number of steps, at the sizes, batches and guidance given: what matters of a guidance
    scale is whether it is above 1. A server with the same --size, --slots and --rows then builds nothing.
    """
    check_backend(backend)
    _check_slots(slots, rows, fixed_rows, batch=batch, guidance=guidance, dynamic=dynamic)
    if warm and compute_capability:
        raise RequestError("--warm draws on this machine, --compute-capability builds for others: give one of them")
    opened = opened_bundle(bundle)
    sizes, batches = [size_of(text, opened.manifest.latent) for text in size or [""]], batch or [1]
    scales, prompts = _scales(opened, guidance), list(product(prompt_parts or [1], _tokens(opened, prompt_tokens)))
    skips = sorted({False, opened.manifest.guidance.skipped is not None})
    if dynamic and len(sizes) * len(batches) * len(prompts) == 1:
        raise RequestError("--dynamic needs a range: give --size or --batch at least twice, the most used one first")

    def wanted(dynamic_backend: bool) -> list[_Wanted]:
        if slots is None:
            every = product(sizes, batches, scales, prompts, skips)
            return [_of_request(opened, *each) for each in every if not each[4] or _branches(opened, each[2]) > 1]
        buckets = buckets_of(rows or rows_of(slots), dynamic=dynamic_backend, fixed_rows=fixed_rows)
        every_size = product(sizes, prompts, skips if buckets[-1] > 2 else [False])  # which takes three rows
        return [_of_batcher(opened, slots, buckets, *each) for each in every_size]

    found: list[dict[str, Any]] = []
    built: Iterator[_Built]
    with progress_bar("building") as progress:
        if compute_capability:
            planners = _planners_for(compute_capability, backend, options, progress)
            built = (each for planner in planners for each in _build(planner, opened, wanted(False), dynamic))
        else:
            device = _open(backend, options, progress)
            if dynamic and isinstance(device, OpenVino) and device.compiles_shapes:
                raise RequestError(f"--dynamic is for TensorRT: on {device.name} give --option shapes=any")
            if isinstance(device, TensorRt):
                built = _build(device.planner, opened, wanted(False), dynamic)
            else:
                built = _open_each(device, opened, wanted(device.dynamic))
        for each in built:
            found.append(asdict(each))
            if not as_json:
                typer.echo(each)
        if warm and slots is not None:
            from ..batcher import Batcher

            with Pipeline(opened, device) as pipe, Batcher(pipe, slots=slots, rows=rows, fixed_rows=fixed_rows) as many:
                many.warm_up(sizes)
        elif warm:
            with Pipeline(opened, device, max_batch=max(batches)) as pipe:
                _warm_up(pipe, sizes, batches, scales)
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@dataclass(frozen=True)
class _Built:
    """An engine that is ready: of a graph, for requests, and where it is in the cache."""

    graph: str
    requests: str
    backend: str
    target: str
    seconds: float | None
    """How long the build took; None for what was there."""
    bytes: int | None
    """None where the backend keeps nothing on disk, as is the folder."""
    folder: str | None

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.graph, self.requests, self.backend, self.target)))
        how = "was there" if self.seconds is None else f"{self.seconds:.1f} s"
        if self.bytes is None:
            return f"{what}: {how}, nothing to keep"
        return f"{what}: {how}, {readable_size(self.bytes)} in {self.folder}"


@dataclass(frozen=True)
class _Wanted:
    """What engines are built for: its name, and the input shapes of each graph."""

    name: str
    shapes: Mapping[str, Sequence[Shapes]]


def _check_slots(slots: int | None, rows: int | None, fixed_rows: bool, **others: Any) -> None:
    """Raise `RequestError` for options of a batcher without its slots, or beside those of a pipeline."""
    if slots is None and (rows is not None or fixed_rows):
        raise RequestError(f"{'--fixed-rows' if rows is None else '--rows'} is given without --slots: give both")
    if slots is not None and (given := [name for name, value in others.items() if value]):
        raise RequestError(f"--slots and --{given[0]} are given: a batcher does not have that, leave one out")
    if slots is not None:
        check_numbers(slots, rows, 1, None)


def _of_request(
    bundle: Bundle, size: tuple[int, int], images: int, guidance: float, prompt: _Prompt, skips: bool
) -> _Wanted:
    shapes = requested_shapes(bundle, *size, images, guidance, *prompt, skips)
    name = f"{size[0]}x{size[1]} batch {images} guidance {guidance:g}{_named(prompt, skips)}"
    return _Wanted(name, {graph: [each] for graph, each in shapes.items()})


def _of_batcher(
    bundle: Bundle, slots: int, buckets: Sequence[int], size: tuple[int, int], prompt: _Prompt, skips: bool
) -> _Wanted:
    name = f"{size[0]}x{size[1]} slots {slots} rows {' '.join(map(str, buckets))}{_named(prompt, skips)}"
    return _Wanted(name, batcher_shapes(bundle, *size, slots, buckets, *prompt, skips))


def _named(prompt: _Prompt, skips: bool) -> str:
    parts, tokens = prompt
    named = (f" prompt parts {parts}" if parts > 1 else "") + (f" prompt tokens {tokens}" if tokens else "")
    return named + (" skipped layers" if skips else "")


def _tokens(bundle: Bundle, given: Sequence[int] | None) -> list[int | None]:
    """Return the lengths of prompts to build for, None for the longest; raises `RequestError` for others."""
    if given and not any(info.lengths or info.any_length for info in bundle.manifest.tokenizers):
        raise RequestError("--prompt-tokens is given: this bundle has one length for all prompts, leave it out")
    found = [next(iter(row_lengths_for(bundle, number).values())) for number in given or ()]
    return list(dict.fromkeys(found)) or [None]


def _scales(bundle: Bundle, given: Sequence[float] | None) -> list[float]:
    """Return a guidance scale for each number of branches to build for, the most used first."""
    scales = dict[int, float]()
    usual = 1.0 if bundle.manifest.guidance.scale == "true_cfg_scale" else bundle.manifest.default_guidance_scale
    for scale in given or (usual, 1.0, 0.0):
        scales.setdefault(_branches(bundle, scale), scale)
    return list(scales.values())


def _branches(bundle: Bundle, scale: float) -> int:
    return len(bundle.manifest.guidance.weights(scale, negative_given=True))


def _warm_up(pipe: Pipeline, sizes: Sequence[tuple[int, int]], batches: Sequence[int], scales: Sequence[float]) -> None:
    for size, scale in product(sizes, scales):
        for asked in guided_requests(pipe.bundle.manifest, scale):
            pipe.warm_up([size], batches, **asked)


def _planners_for(
    capabilities: Sequence[str], backend: str, options: Sequence[str] | None, progress: Progress
) -> list[Planner]:
    """Return the planners of GPUs that need not be there."""
    name = "tensorrt-rtx" if backend == "auto" else backend
    targets = [target_of_compute_capability(name, capability) for capability in capabilities]
    chosen = plan_options(**options_of(plan_options, name, options))
    return [Planner(name, target, options=chosen, progress=progress) for target in targets]


def _build(planner: Planner, bundle: Bundle, wanted: Sequence[_Wanted], dynamic: bool) -> Iterator[_Built]:
    """Build the plans of a bundle, one after the other."""
    target = " ".join(planner.target.values())
    for graph, profile, what in _plans(bundle, wanted, dynamic):
        done = planner.is_built(bundle, graph, profile)
        plan = planner.build(bundle, graph, profile)
        seconds = None if done else float(plan.facts["build_seconds"])
        size = plan.path.stat().st_size
        yield _Built(graph.name, what, planner.backend, target, seconds, size, str(plan.folder))


def _plans(bundle: Bundle, wanted: Sequence[_Wanted], dynamic: bool) -> Iterator[tuple[GraphInfo, Profile, str]]:
    """Yield every graph with each profile to build, once, and what it is for."""
    for name in wanted[0].shapes:
        graph = bundle.graph(name)
        if dynamic:
            shapes = [shapes for each in wanted for shapes in each.shapes[name]]
            yield graph, profile_for(graph, *shapes), " or ".join(each.name for each in wanted)
            continue
        seen = []
        for each in wanted:
            profile = Profile.together([profile_for(graph, shapes) for shapes in each.shapes[name]])
            if profile not in seen:
                seen.append(profile)
                yield graph, profile, each.name


def _open(name: str, options: Sequence[str] | None, progress: Progress) -> Backend:
    try:
        return open_backend(name, progress=progress, **backend_options(name, options))
    except BackendUnavailableError as error:
        hint = "; with --compute-capability X.Y it builds for a GPU elsewhere" if name == "tensorrt-rtx" else ""
        raise BackendUnavailableError(f"{error}{hint}") from error


def _open_each(backend: Backend, bundle: Bundle, wanted: Sequence[_Wanted]) -> Iterator[_Built]:
    """Open and close every graph, which builds what the backend keeps in the cache."""
    once = not isinstance(backend, OpenVino) or not backend.compiles_shapes  # others keep nothing of a shape
    for each in wanted[: 1 if once else None]:
        for name, every in each.shapes.items():
            for shapes in every[: 1 if once else None]:
                yield _opened(backend, bundle, bundle.graph(name), shapes, "every size" if once else each.name)


def _opened(backend: Backend, bundle: Bundle, graph: GraphInfo, shapes: Shapes, what: str) -> _Built:
    began, before = time.perf_counter(), _folder(backend, bundle, graph, shapes)
    backend.open(bundle, graph, shapes).close()
    seconds, folder = time.perf_counter() - began, _folder(backend, bundle, graph, shapes)
    size = None if folder is None else sum(file.stat().st_size for file in folder.iterdir())
    kept = None if folder is None else str(folder)
    return _Built(graph.name, what, backend.name, "", None if before else seconds, size, kept)


def _folder(backend: Backend, bundle: Bundle, graph: GraphInfo, shapes: Shapes) -> Path | None:
    """Return where a backend keeps its engine of a graph in the cache, or None."""
    if isinstance(backend, OpenVino):
        return backend.find(bundle, graph, shapes)
    return EngineCache().find(graph.name, backend.key(bundle, graph)) if isinstance(backend, OnnxRuntimeCpu) else None
