"""`latentrt build`: engines ahead of the first request, for this machine or for another GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...engines.backends import Backend, open_backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.engine import Shapes
from ...engines.errors import BackendUnavailableError, RequestError
from ...engines.tensorrt.engine import TensorRt, plan_options
from ...engines.tensorrt.plan import Profile, profile_for
from ...engines.tensorrt.planner import Planner, target_of_compute_capability
from ..shapes import requested_shapes
from ..sizes import check_size, parse_size
from .options import BackendOptions, backend_options, options_of
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
    options: BackendOptions = None,
) -> None:
    """Build a bundle's engines into the cache, so that the first request need not wait for it."""
    opened = Bundle.open(bundle)
    sizes, batches = [_size(opened, text) for text in size or [""]], batch or [1]
    requests = [_Request(width, height, images) for width, height in sizes for images in batches]
    if dynamic and len(requests) == 1:
        raise RequestError("--dynamic needs a range: give --size or --batch at least twice, the most used one first")
    shapes = [requested_shapes(opened, r.width, r.height, r.images) for r in requests]
    with progress_bar("building") as progress:
        if compute_capability:
            name = "tensorrt-rtx" if backend == "auto" else backend
            targets = [target_of_compute_capability(name, capability) for capability in compute_capability]
            chosen = plan_options(**options_of(plan_options, name, options))
            planners = [Planner(name, target, options=chosen, progress=progress) for target in targets]
        else:
            device = _open(backend, options)
            if not isinstance(device, TensorRt):
                _open_each(device, opened, shapes)
                return
            planners = [Planner(device.name, device.planner.target, options=device.planner.options, progress=progress)]
        for planner in planners:
            for graph, profile, what in _plans(opened, requests, shapes, dynamic):
                done = planner.is_built(opened, graph, profile)
                plan = planner.build(opened, graph, profile)
                size_mib = plan.path.stat().st_size / 2**20
                how = "was there" if done else f"{plan.facts['build_seconds']:.1f} s"
                target = " ".join(planner.target.values())
                typer.echo(f"{graph.name} {what} {planner.backend} {target}: {how}, {size_mib:.1f} MiB")


@dataclass(frozen=True)
class _Request:
    width: int
    height: int
    images: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} batch {self.images}"


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


def _open(name: str, options: Sequence[str] | None) -> Backend:
    try:
        return open_backend(name, **backend_options(name, options))
    except BackendUnavailableError as error:
        hint = "; with --compute-capability X.Y it builds for a GPU elsewhere" if name == "tensorrt-rtx" else ""
        raise BackendUnavailableError(f"{error}{hint}") from error


def _open_each(backend: Backend, bundle: Bundle, shapes: Sequence[Mapping[str, Shapes]]) -> None:
    """Open and close every graph, which builds what the backend caches."""
    for each in shapes[:1] if backend.dynamic else shapes:
        for name, wanted in each.items():
            backend.open(bundle, bundle.graph(name), wanted).close()
            typer.echo(f"{name} {backend.name}: ready")


def _size(bundle: Bundle, text: str) -> tuple[int, int]:
    latent = bundle.manifest.latent
    if not text:
        return latent.default_width, latent.default_height
    width, height = parse_size(text)
    check_size(width, height, latent)
    return width, height
