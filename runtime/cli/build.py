"""`latentrt build`: engines ahead of the first request, for this machine or for another GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ...engines.backends import Backend, open_backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Tensor
from ...engines.engine import BoundEngine
from ...engines.errors import BackendUnavailableError, RequestError
from ...engines.host import HostDevice
from ...engines.tensorrt.engine import TensorRt, plan_options
from ...engines.tensorrt.plan import Profile, profile_for
from ...engines.tensorrt.planner import Planner, target_of_compute_capability
from ..loop.inputs import loop_arrays
from ..loop.workspace import Workspace
from ..sampling import step_table
from .options import BackendOptions, backend_options, options_of
from .progress import progress_bar

Shapes = Mapping[str, Sequence[int]]


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


class _Notes:
    """An engine that only takes note of the shapes that it is opened for."""

    def __init__(self, graph: GraphInfo) -> None:
        self.name = graph.name
        self.inputs = {t.name: t for t in graph.inputs}
        self.outputs = {t.name: t for t in graph.outputs}

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundEngine:
        return self  # type: ignore[return-value]

    def close(self) -> None: ...


def requested_shapes(bundle: Bundle, width: int, height: int, images: int) -> dict[str, Shapes]:
    """Return the input shapes of every graph for a request, as the runtime itself asks for them.

    A workspace of that request is wired on the host with engines that only take notes.
    """
    manifest = bundle.manifest
    branches = 2 if manifest.default_guidance_scale > 1 else 1
    network = next(t.dtype for t in bundle.graph("denoiser").inputs if t.name == "model_input")
    latent = manifest.latent
    arrays = loop_arrays(
        step_table(manifest.scheduler, manifest.default_num_inference_steps),
        [0] * images,
        (latent.channels, height // latent.downscale, width // latent.downscale),
        guidance_scale=manifest.default_guidance_scale,
        branches=branches,
        network_dtype=network,
    )
    ids = {t.output: np.zeros((branches * images, t.max_length), np.int64) for t in manifest.tokenizers}
    shapes: dict[str, Shapes] = {}

    def open_engine(graph: GraphInfo, wanted: Shapes) -> _Notes:
        shapes[graph.name] = {name: tuple(shape) for name, shape in wanted.items()}
        return _Notes(graph)

    Workspace(HostDevice(), bundle, open_engine, ids, arrays).close()
    if bundle.has_graph("image_encoder"):
        shapes["image_encoder"] = {"image": (1, height, width, 3)}
    return shapes


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
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise RequestError(f"size is {text!r}: give WIDTHxHEIGHT in pixels, such as 512x512")
    width, height = int(match[1]), int(match[2])
    for name, side in (("width", width), ("height", height)):
        if side == 0 or side % latent.size_multiple:
            raise RequestError(f"{name} is {side}: this bundle needs a multiple of {latent.size_multiple}")
    return width, height
