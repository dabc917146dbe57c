"""The input shapes of every graph for a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..engines.bundle import Bundle
from ..engines.engine import Shapes
from ..engines.errors import RequestError
from .batches import Arrays, Batches
from .loop.decoding import GRAPHS
from .loop.wiring import wired_shapes
from .prompt.conditioning import blank_parts
from .request import GenerationRequest
from .sampling import step_table
from .sampling.step_table import StepTable

GUIDED = 2.0
"""A guidance scale above 1: without guidance no layers are skipped."""


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
    arrays, _ = _blank(bundle, width, height, images, guidance_scale, 1, prompt_tokens, skips)
    shapes = wired_shapes(bundle, *arrays)
    if prompt_parts > 1:
        arrays, _ = _blank(bundle, width, height, images, guidance_scale, prompt_parts, prompt_tokens, skips)
        shapes |= wired_shapes(bundle, *arrays)
    if bundle.has_graph(GRAPHS["tiny"]):
        shapes[GRAPHS["tiny"]] = shapes[GRAPHS["full"]]
    if bundle.has_graph("image_encoder"):
        specs = bundle.graph("image_encoder").inputs
        shapes["image_encoder"] = {spec.name: (1, height, width, int(spec.shape[3])) for spec in specs}
    return shapes


def batcher_shapes(
    bundle: Bundle,
    width: int,
    height: int,
    slots: int,
    buckets: Sequence[int],
    prompt_parts: int = 1,
    prompt_tokens: int | None = None,
    skips: bool = False,
) -> dict[str, list[Shapes]]:
    """Return the input shapes of every graph for a batcher of so many slots and these numbers of rows, one for each.

    Prompts are as in `requested_shapes`, as are `skips` and what is raised.
    """
    from .batcher.prepared import fit_of
    from .batcher.warm_up import engine_shapes

    shapes: dict[str, list[Shapes]] = {}
    for parts in dict.fromkeys((1, prompt_parts)):
        scale = GUIDED if skips else None
        (inputs, arrays), table = _blank(bundle, width, height, 1, scale, parts, prompt_tokens, skips)
        channels, *cells = arrays["latents"].shape[1:]
        fit = fit_of(bundle, inputs, (channels, cells[0], cells[1]), table)
        row = {name: array[:1] for name, array in inputs.items()}
        shapes |= engine_shapes(bundle, (row, arrays), fit, slots, buckets)
    if bundle.has_graph(GRAPHS["tiny"]):
        shapes[GRAPHS["tiny"]] = shapes[GRAPHS["full"]]
    return shapes


def _blank(
    bundle: Bundle,
    width: int,
    height: int,
    images: int,
    scale: float | None,
    parts: int,
    tokens: int | None,
    skips: bool = False,
) -> tuple[Arrays, StepTable]:
    """Return the arrays of a request before anything is drawn, and its table."""
    manifest = bundle.manifest
    guided = {} if scale is None else {manifest.guidance.scale: scale, "negative_prompt": ""}
    request = GenerationRequest.of(prompt="", width=width, height=height, **guided).with_defaults(manifest)
    steps, size = manifest.default_num_inference_steps, (width, height)
    table = step_table(manifest.scheduler, steps, rule=manifest.schedule, size=size)
    table = replace(table, skipped=(1.0,) * len(table)) if skips else table
    if parts > 1:
        return Batches.blank(bundle, request, table, images, blank_parts(bundle, parts)), table
    return Batches.blank(bundle, request, table, images, lengths=row_lengths_for(bundle, tokens)), table


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
