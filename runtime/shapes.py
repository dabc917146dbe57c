"""The input shapes of every graph for a request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..engines.bundle import Bundle, GraphInfo
from ..engines.device import Tensor
from ..engines.engine import BoundEngine, Shapes
from ..engines.host import HostDevice
from .loop.inputs import loop_arrays
from .loop.workspace import Workspace
from .prompt.numbers import number_inputs
from .request import GenerationRequest
from .sampling import step_table


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
    request = GenerationRequest(prompt=("",), width=width, height=height).with_defaults(manifest)
    inputs = {t.output: np.zeros((branches * images, t.max_length), np.int64) for t in manifest.tokenizers}
    inputs |= number_inputs(bundle, request, branches * images)
    shapes: dict[str, Shapes] = {}

    def open_engine(graph: GraphInfo, wanted: Shapes) -> _Notes:
        shapes[graph.name] = {name: tuple(shape) for name, shape in wanted.items()}
        return _Notes(graph)

    Workspace(HostDevice(), bundle, open_engine, inputs, arrays).close()
    if bundle.has_graph("image_encoder"):
        shapes["image_encoder"] = {"image": (1, height, width, 3)}
    return shapes
