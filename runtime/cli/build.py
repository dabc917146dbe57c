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
from ..shapes import requested_shapes, row_lengths_for
from ..sizes import check_size, parse_size
from .bundle import readable_size
from .options import BackendOptions, backend_options, check_backend, opened_bundle, options_of
from .progress import progress_bar


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
    warm: Annotated[
        bool,
        typer.Option("--warm", help="Then draw once with each, so that engines are loaded here and known to work."),
    ] = False,
    options: BackendOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a bundle's engines into the cache, so that the first request need not wait for it.

    They serve every sampler and number of steps, at the sizes, batches and guidance given: what matters of a guidance
    scale is whether it is above 1.
    """
    check_backend(backend)
    if warm and compute_capability:
        raise RequestError("--warm draws on this machine, --compute-capability builds for others: give one of them")
    opened = opened_bundle(bundle)
    sizes, batches = [_size(opened, text) for text in size or [""]], batch or [1]
    scales = _scales(opened, guidance)
    parts = prompt_parts or [1]
    tokens = _tokens(opened, prompt_tokens)
    requests = [_Request(*each) for each in product(sizes, batches, scales, parts, tokens, (False, True))]
    can_skip = opened.manifest.guidance.skipped is not None
    requests = [r for r in requests if not r.skips or (can_skip and _branches(opened, r.guidance) > 1)]
    if dynamic and len(sizes) * len(batches) * len(parts) * len(tokens) == 1:
        raise RequestError("--dynamic needs a range: give --size or --batch at least twice, the most used one first")
    shapes = [requested_shapes(opened, *r.size, r.images, r.guidance, r.parts, r.tokens, r.skips) for r in requests]
    found: list[dict[str, Any]] = []
    built: Iterator[_Built]
    with progress_bar("building") as progress:
        if compute_capability:
            planners = _planners_for(compute_capability, backend, options, progress)
            built = (each for planner in planners for each in _build(planner, opened, requests, shapes, dynamic))
        else:
            device = _open(backend, options, progress)
            if isinstance(device, TensorRt):
                built = _build(device.planner, opened, requests, shapes, dynamic)
            else:
                built = _open_each(device, opened, requests, shapes)
        for each in built:
            found.append(asdict(each))
            if not as_json:
                typer.echo(each)
        if warm:
            _warm_up(opened, device, sizes, batches, scales)
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
class _Request:
    size: tuple[int, int]
    images: int
    guidance: float
    parts: int
    tokens: int | None
    skips: bool

    def __str__(self) -> str:
        parts = f" prompt parts {self.parts}" if self.parts > 1 else ""
        parts += f" prompt tokens {self.tokens}" if self.tokens else ""
        parts += " skipped layers" if self.skips else ""
        return f"{self.size[0]}x{self.size[1]} batch {self.images} guidance {self.guidance:g}{parts}"


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


def _warm_up(
    bundle: Bundle, backend: Backend, sizes: Sequence[tuple[int, int]], batches: Sequence[int], scales: Sequence[float]
) -> None:
    from ..pipeline import Pipeline

    with Pipeline(bundle, backend, max_batch=max(batches)) as pipe:
        for size in sizes:
            for scale in scales:
                pipe.warm_up([size], batches, guidance_scale=scale)


def _planners_for(
    capabilities: Sequence[str], backend: str, options: Sequence[str] | None, progress: Progress
) -> list[Planner]:
    """Return the planners of GPUs that need not be there."""
    name = "tensorrt-rtx" if backend == "auto" else backend
    targets = [target_of_compute_capability(name, capability) for capability in capabilities]
    chosen = plan_options(**options_of(plan_options, name, options))
    return [Planner(name, target, options=chosen, progress=progress) for target in targets]


def _build(
    planner: Planner,
    bundle: Bundle,
    requests: Sequence[_Request],
    shapes: Sequence[Mapping[str, Shapes]],
    dynamic: bool,
) -> Iterator[_Built]:
    """Build the plans of a bundle, one after the other."""
    target = " ".join(planner.target.values())
    for graph, profile, what in _plans(bundle, requests, shapes, dynamic):
        done = planner.is_built(bundle, graph, profile)
        plan = planner.build(bundle, graph, profile)
        seconds = None if done else float(plan.facts["build_seconds"])
        size = plan.path.stat().st_size
        yield _Built(graph.name, what, planner.backend, target, seconds, size, str(plan.folder))


def _plans(
    bundle: Bundle, requests: Sequence[_Request], shapes: Sequence[Mapping[str, Shapes]], dynamic: bool
) -> Iterator[tuple[GraphInfo, Profile, str]]:
    """Yield every graph with each profile to build, once, and the requests that it is for."""
    for name in shapes[0]:
        graph = bundle.graph(name)
        if dynamic:
            yield graph, profile_for(graph, *(each[name] for each in shapes)), " or ".join(map(str, requests))
            continue
        seen = []
        for request, each in zip(requests, shapes, strict=True):
            profile = profile_for(graph, each[name])
            if profile not in seen:
                seen.append(profile)
                yield graph, profile, str(request)


def _open(name: str, options: Sequence[str] | None, progress: Progress) -> Backend:
    try:
        return open_backend(name, progress=progress, **backend_options(name, options))
    except BackendUnavailableError as error:
        hint = "; with --compute-capability X.Y it builds for a GPU elsewhere" if name == "tensorrt-rtx" else ""
        raise BackendUnavailableError(f"{error}{hint}") from error


def _open_each(
    backend: Backend, bundle: Bundle, requests: Sequence[_Request], shapes: Sequence[Mapping[str, Shapes]]
) -> Iterator[_Built]:
    """Open and close every graph, which builds what the backend keeps in the cache."""
    once = backend.dynamic and not (isinstance(backend, OpenVino) and backend.fixed)
    for request, each in list(zip(requests, shapes, strict=True))[: 1 if once else None]:
        for name, wanted in each.items():
            graph = bundle.graph(name)
            began = time.perf_counter()
            before = _folder(backend, bundle, graph, wanted)
            backend.open(bundle, graph, wanted).close()
            seconds, folder = time.perf_counter() - began, _folder(backend, bundle, graph, wanted)
            yield _Built(
                name,
                "every size" if once else str(request),
                backend.name,
                "",
                None if before else seconds,
                None if folder is None else sum(file.stat().st_size for file in folder.iterdir()),
                None if folder is None else str(folder),
            )


def _folder(backend: Backend, bundle: Bundle, graph: GraphInfo, shapes: Shapes) -> Path | None:
    """Return where a backend keeps its engine of a graph in the cache, or None."""
    if isinstance(backend, OpenVino):
        return backend.find(bundle, graph, shapes)
    return EngineCache().find(graph.name, backend.key(bundle, graph)) if isinstance(backend, OnnxRuntimeCpu) else None


def _size(bundle: Bundle, text: str) -> tuple[int, int]:
    latent = bundle.manifest.latent
    if not text:
        return latent.default_width, latent.default_height
    width, height = parse_size(text)
    check_size(width, height, latent)
    return width, height
