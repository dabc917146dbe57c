"""The way of one checkpoint: open it, export and check one network after the other, write the manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..engines.bundle import (
    FORMAT_VERSION,
    GraphInfo,
    LatentInfo,
    Manifest,
    Parity,
    Precision,
    ScheduleRule,
    SkippedLayers,
    TokenizerInfo,
    atomic_folder,
    describe_files,
    write_manifest,
)
from ..engines.errors import RequestError, UnsupportedModelError
from ..engines.files import sha256_of
from ..engines.progress import Progress
from ..runtime.loop.hoisted import MODULATION
from ..runtime.sampling import check_scheduler
from ..runtime.sampling.step_table import STEP_INPUTS, StepOption
from .activations import HALF_LIMIT, largest_activation
from .checkpoints.checkpoint import LAYERS_OF_A_STACK, Checkpoint
from .checkpoints.configs import reading
from .checkpoints.defaults import asked_defaults
from .checkpoints.sources import open_checkpoint
from .checkpoints.textual_inversion import LearnedWord, check_words, open_words, provenance, with_words
from .checkpoints.tokenizer import write_tokenizer
from .checkpoints.vae import with_tiny_decoder
from .families import Family, family_named
from .graph import Graph
from .onnx_writer import onnx_model
from .parity import check_parity, native_case, reference_cases
from .passes.parts import outputs_of, with_references, write_parts, write_whole
from .passes.winograd import LEAST_CHANNELS, LEAST_PIXELS, fewer_products, output_pixels
from .pieces import memory_given_back
from .step_rows import write_step_graph

TOOLS = ("torch", "onnx", "onnxscript", "diffusers", "transformers")

FLOAT_AT_THE_BORDER = ("decoder", "tiny_decoder", "image_encoder")
"""Graphs whose inputs and outputs are not in the bundle's precision, so that they may keep fp32 inside."""

MOST_AT_FULL_SIZE = 3_000_000_000
"""Weights of a network above which it is not computed at its default size, and checked by a copy of few layers."""

LIMIT: Mapping[Precision, float] = {"fp16": HALF_LIMIT, "bf16": inf}
TORCH_DTYPES_INSIDE: Mapping[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}

log = logging.getLogger(__name__)


def export(
    source: str | Path,
    out: Path,
    *,
    precision: Precision,
    revision: str | None,
    replace_bundle: bool,
    tokenizer: str | Path | None,
    prediction_type: str | None,
    vae: str | Path | None,
    variant: str | None,
    base: str | Path | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    skip_layers: Sequence[int] | None,
    textual_inversion: Sequence[str | Path],
    tiny_decoder: str | Path | None,
    hoist: bool,
    winograd: bool,
    progress: Progress,
) -> Path:
    """Export a checkpoint; see `latentrt.export.export_checkpoint`."""
    asked = asked_defaults(num_inference_steps, guidance_scale)
    if winograd and precision != "fp32":
        raise RequestError(f"winograd is for processors, and precision is {precision!r}: export in fp32, or without it")
    with atomic_folder(out, replace=replace_bundle) as folder:
        progress("opening the checkpoint", 0, 1)
        checkpoint = open_checkpoint(
            source, revision, tokenizer=tokenizer, prediction_type=prediction_type, vae=vae, variant=variant, base=base
        )
        checkpoint = replace(checkpoint, skip_layers=None if skip_layers is None else tuple(skip_layers))
        family = family_named(checkpoint.family)
        family.check(checkpoint)
        layers = family.skip_layers(checkpoint)
        checkpoint = replace(checkpoint, skip_layers=layers)
        words = open_words(textual_inversion)
        check_words(checkpoint, words)
        tokens = write_tokenizers(family, checkpoint, folder, words)
        checkpoint = with_words(checkpoint, words, folder / "tokenizer.json")
        lengths = {name: info.max_length for name, info in tokens.items()}
        latent = family.latent(checkpoint)
        checkpoint = with_tiny_decoder(checkpoint, tiny_decoder, variant, latent)
        scheduler, schedule = family.scheduler(checkpoint), family.schedule(checkpoint)
        options = step_options_of(scheduler, schedule, latent, learned_variance=family.learned_variance(checkpoint))
        networks = family.graphs(checkpoint, precision, lengths)
        graphs, stages = [], len(networks) + 2
        for number, name in enumerate(networks, start=1):
            progress(name.replace("_", " "), number, stages)
            graphs += write_network(
                family, checkpoint, lengths, name, folder, precision, hoist=hoist, winograd=winograd
            )
        if winograd and not any(info.winograd for info in graphs):
            log.warning(
                "no convolution of this checkpoint has %d channels and %d pixels: winograd changed nothing",
                LEAST_CHANNELS,
                LEAST_PIXELS,
            )
        graphs.append(write_step_graph(folder, precision, latent.channels, options))
        progress("hashing", stages - 1, stages)
        write_manifest(
            folder,
            Manifest(
                format_version=FORMAT_VERSION,
                family=family.name,
                precision=precision,
                graphs=tuple(graphs),
                tokenizers=tuple(tokens.values()),
                inputs=family.inputs(checkpoint),
                masked_input=family.masked_input(checkpoint),
                latent=latent,
                scheduler=scheduler,
                schedule=schedule,
                guidance=family.guidance(checkpoint).model_copy(
                    update={"skipped": SkippedLayers(layers=layers) if layers else None}
                ),
                **(family.defaults(checkpoint) | dict(checkpoint.defaults) | asked),
                files=describe_files(folder),
                source=_provenance(checkpoint, words),
                tools={tool: metadata.version(tool) for tool in TOOLS},
            ),
        )
    progress("done", stages, stages)
    return out


def write_network(
    family: Family,
    checkpoint: Checkpoint,
    lengths: Mapping[str, int],
    name: str,
    folder: Path,
    precision: Precision,
    *,
    hoist: bool = False,
    winograd: bool = False,
) -> list[GraphInfo]:
    """Export one network of a checkpoint; `lengths` are the tokens of a prompt, for each tokenizer.

    With `hoist` a denoiser becomes several graphs, of which each step runs as few as it can. With `winograd` large
    convolutions are computed in half the products.
    """

    def alike(precision: Precision, few: bool) -> Graph:
        like, layers = (checkpoint.shallow(), LAYERS_OF_A_STACK) if few else (checkpoint, None)
        return replace(family.graphs(like, precision, lengths)[name](), layers=layers)

    latent = family.latent(checkpoint)
    cells = (latent.default_height // latent.downscale, latent.default_width // latent.downscale)
    with memory_given_back():
        build = family.graphs(checkpoint, precision, lengths)[name]
        hoist = hoist and name == "denoiser"
        infos = write_graph(build, folder, precision, cells, alike, hoist=hoist, winograd=winograd)
        checkpoint.close()
    return infos


def write_tokenizers(
    family: Family, checkpoint: Checkpoint, folder: Path, words: Sequence[LearnedWord] = ()
) -> dict[str, TokenizerInfo]:
    """Write a checkpoint's tokenizers and return their contracts; `tokenizer_2` feeds `token_ids_2`."""
    lengths, kinds, written = family.token_lengths(checkpoint), family.tokenizer_kinds(checkpoint), {}
    for name, source in checkpoint.tokenizers.items():
        max_length, vocab_size = lengths[name]
        written[name] = write_tokenizer(
            source.folder,
            folder / f"{name}.json",
            output=name.replace("tokenizer", "token_ids"),
            max_length=max_length,
            vocab_size=vocab_size,
            pad_id=source.pad_id,
            words=words,
            kind=kinds[name],
        )
    return written


def write_graph(
    build: Callable[[], Graph],
    folder: Path,
    precision: Precision,
    cells: tuple[int, int],
    alike: Callable[[Precision, bool], Graph] | None = None,
    *,
    hoist: bool = False,
    winograd: bool = False,
) -> list[GraphInfo]:
    """Export one graph into `folder`, check it against its module, and describe it, or with `hoist` its parts.

    Reference rows are recorded at a small size and at `cells`, the latent height and width of the default picture.
    `alike` builds the graph in another precision, of all layers or of the first and the last alone: what is checked
    in place of a graph that this machine cannot run. Weights are read one at a time from their files.
    """
    graph = build()
    size = sum(parameter.numel() for parameter in graph.module.parameters())
    log.info("exporting %s, %.3g million weights", graph.name, size / 1e6)
    with largest_activation(graph.module) as peak:
        cases = reference_cases(graph)
        with output_pixels(graph.module) as pixels:
            native = native_case(graph, cells) if size <= MOST_AT_FULL_SIZE else None
    if precision != "fp32" and graph.name in FLOAT_AT_THE_BORDER and peak() > LIMIT[precision]:
        log.warning("%s reaches activations of %.3g, too large for %s: it stays in fp32", graph.name, peak(), precision)
        precision = "fp32"
    if precision != "fp32":
        graph.module.to(TORCH_DTYPES_INSIDE[precision])
    kinds = {"small": cases[-1]} if native is None else {"small": cases[-1], "native": native}
    model = onnx_model(graph)
    count = fewer_products(model, pixels) if winograd else 0
    parts = (write_parts if hoist else write_whole)(graph, model, folder, precision)
    parts[-1] = parts[-1].model_copy(update={"winograd": count})
    runs_here = alike is None or (precision != "bf16" and size <= MOST_AT_FULL_SIZE)
    if runs_here:
        parity = check_parity(graph.name, partial(outputs_of, parts, folder), cases, precision)
    else:
        assert alike is not None
        graph = alike("fp32" if precision == "bf16" else precision, size > MOST_AT_FULL_SIZE)
        parity = _parity_of(graph, precision, hoist=hoist)
    if runs_here or not hoist:
        parts = with_references(parts, folder, kinds)
    log.info("%s: relative error %.2g against its module", graph.name, parity.relative_error)
    return [part if part.name == MODULATION else part.model_copy(update={"parity": parity}) for part in parts]


def _parity_of(graph: Graph, precision: Precision, *, hoist: bool) -> Parity:
    """Return the parity of a graph that is not kept, taken apart as the one that is."""
    cases = reference_cases(graph)
    if precision == "fp16":
        graph.module.half()
    with TemporaryDirectory() as folder:
        precision = "fp32" if precision == "bf16" else precision
        parts = (write_parts if hoist else write_whole)(graph, onnx_model(graph), Path(folder), precision)
        parity = check_parity(graph.name, partial(outputs_of, parts, Path(folder)), cases, precision)
    return parity.model_copy(update={"layers": graph.layers})


def step_options_of(
    scheduler: Mapping[str, Any], schedule: ScheduleRule | None, latent: LatentInfo, *, learned_variance: bool
) -> tuple[StepOption, ...]:
    """Return what a checkpoint's step graph has beside a table's rows: what its scheduler needs and its denoiser gives.

    Raises `UnsupportedModelError` for a scheduler that no step table expresses, or that needs what is not there.
    """
    needed = check_scheduler(scheduler, schedule, (latent.default_width, latent.default_height))
    if "learned variance" in needed and not learned_variance:
        raise UnsupportedModelError(
            f"the checkpoint's scheduler {scheduler['_class_name']} with variance_type={scheduler['variance_type']!r} "
            "needs variances, and the denoiser gives none: set variance_type to 'fixed_small' in "
            "scheduler/scheduler_config.json, or take ddim, and export again"
        )
    found: set[StepOption] = {*needed, "learned variance"} if learned_variance else {*needed}
    return tuple(option for option in STEP_INPUTS if option in found)


@reading("the checkpoint")
def _provenance(checkpoint: Checkpoint, words: Sequence[LearnedWord]) -> dict[str, Any]:
    files = {name: sha256_of(file) for name, file in sorted(checkpoint.files.items())}
    source: dict[str, Any] = {"name": checkpoint.name, "revision": checkpoint.revision, "files": files}
    if checkpoint.variant is not None:
        source["variant"] = checkpoint.variant
    if replaced := {name: {"name": o.name, "revision": o.revision} for name, o in checkpoint.replaced.items()}:
        source["replaced"] = replaced
    if (tiny := checkpoint.tiny_decoder) is not None:
        source["tiny_decoder"] = {"name": tiny.name, "revision": tiny.revision}
    if words:
        source["textual_inversion"] = provenance(words)
    return source
