"""The input shapes of every graph for a request."""

from __future__ import annotations

from dataclasses import replace

from ..engines.bundle import Bundle
from ..engines.engine import Shapes
from ..engines.errors import RequestError
from .batches import Batches
from .loop.decoding import GRAPHS
from .loop.wiring import wired_shapes
from .prompt.conditioning import blank_parts
from .request import GenerationRequest
from .sampling import step_table


def requested_shapes(
    bundle: Bundle,
    width: int,
    height: int,
    images: int,
    guidance_scale: float | None = None,
    prompt_parts: int = 1,
    prompt_tokens: int | None = None,
    skips: bool = False,
) -> dict[str, Shapes]:
    """Return the input shapes of every graph for a request, as the runtime itself asks for them.

    Its sampler and number of steps are the bundle's own, as is the guidance scale where none is given. `prompt_tokens`
    matters to tokenizers with several lengths of rows, which are filled up to the next (default: the longest), and to
    those with rows of any. With `skips` its guidance also skips layers, at some step. Raises
    `RequestError` where the bundle takes no prompts of several parts, or none of so many tokens.
    """
    manifest = bundle.manifest
    guided = {} if guidance_scale is None else {manifest.guidance.scale: guidance_scale, "negative_prompt": ""}
    request = GenerationRequest.of(prompt="", width=width, height=height, **guided)
    steps, size = manifest.default_num_inference_steps, (width, height)
    table = step_table(manifest.scheduler, steps, rule=manifest.schedule, size=size)
    table = replace(table, skipped=(1.0,) * len(table)) if skips else table
    complete = request.with_defaults(manifest)
    lengths = row_lengths_for(bundle, prompt_tokens)
    shapes = wired_shapes(bundle, *Batches.blank(bundle, complete, table, images, lengths=lengths))
    if prompt_parts > 1:
        shapes |= wired_shapes(
            bundle, *Batches.blank(bundle, complete, table, images, blank_parts(bundle, prompt_parts))
        )
    if bundle.has_graph(GRAPHS["tiny"]):
        shapes[GRAPHS["tiny"]] = shapes[GRAPHS["full"]]
    if bundle.has_graph("image_encoder"):
        specs = bundle.graph("image_encoder").inputs
        shapes["image_encoder"] = {spec.name: (1, height, width, int(spec.shape[3])) for spec in specs}
    return shapes


def row_lengths_for(bundle: Bundle, tokens: int | None) -> dict[str, int]:
    """Return how long rows are that so many tokens of a prompt fit in, for tokenizers with several lengths, or any.

    Rows are those of a graph input; None stands for all the tokens that a prompt may have. Raises `RequestError` for
    more than a prompt may have.
    """
    found = {}
    for info in bundle.manifest.tokenizers if tokens is not None else ():
        if info.lengths or info.any_length:
            known = (tokens or 0, info.max_length) if info.any_length else (*info.lengths, info.max_length)
            fitting = [length for length in known if (tokens or 0) <= length <= info.max_length]
            if not fitting:
                raise RequestError(
                    f"prompts of {tokens} tokens are asked for: this bundle has {info.max_length} at most"
                )
            found[info.output] = fitting[0]
    return found
