"""The input shapes of every graph for a request."""

from __future__ import annotations

from ..engines.bundle import Bundle
from ..engines.engine import Shapes
from .batches import Batches
from .loop.wiring import wired_shapes
from .prompt.conditioning import blank_parts
from .request import GenerationRequest
from .sampling import step_table


def requested_shapes(
    bundle: Bundle, width: int, height: int, images: int, guidance_scale: float | None = None, prompt_parts: int = 1
) -> dict[str, Shapes]:
    """Return the input shapes of every graph for a request, as the runtime itself asks for them.

    Its sampler and number of steps are the bundle's own, as is the guidance scale where none is given. Raises
    `RequestError` where the bundle takes no prompts of several parts.
    """
    manifest = bundle.manifest
    guided = {} if guidance_scale is None else {manifest.guidance.scale: guidance_scale, "negative_prompt": ""}
    request = GenerationRequest.of(prompt="", width=width, height=height, **guided)
    steps, size = manifest.default_num_inference_steps, (width, height)
    table = step_table(manifest.scheduler, steps, rule=manifest.schedule, size=size)
    complete = request.with_defaults(manifest)
    shapes = wired_shapes(bundle, *Batches.blank(bundle, complete, table, images))
    if prompt_parts > 1:
        shapes |= wired_shapes(
            bundle, *Batches.blank(bundle, complete, table, images, blank_parts(bundle, prompt_parts))
        )
    if bundle.has_graph("image_encoder"):
        specs = bundle.graph("image_encoder").inputs
        shapes["image_encoder"] = {spec.name: (1, height, width, int(spec.shape[3])) for spec in specs}
    return shapes
