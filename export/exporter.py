"""The way of one checkpoint: open it, export and check one network after the other, write the manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from ..engines.bundle import (
    FORMAT_VERSION,
    GraphInfo,
    Manifest,
    Precision,
    TensorInfo,
    TokenizerInfo,
    atomic_folder,
    describe_files,
    write_manifest,
)
from ..engines.bundle.references import write_reference
from ..engines.files import sha256_of
from ..engines.progress import Progress
from ..runtime.sampling import check_scheduler
from .activations import HALF_LIMIT, largest_activation
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.sources import open_checkpoint
from .checkpoints.textual_inversion import LearnedWord, check_words, open_words, provenance, with_words
from .checkpoints.tokenizer import write_tokenizer
from .families import Family, family_named
from .graph import Graph
from .onnx_writer import OPSET, onnx_model, save_model
from .parity import check_parity, native_case, record, reference_cases
from .step_graph import step_graph
from .step_rows import LIMITS, step_rows

TOOLS = ("torch", "onnx", "onnxscript", "diffusers", "transformers")

FLOAT_AT_THE_BORDER = ("decoder", "image_encoder")
"""Graphs whose inputs and outputs are not in the bundle's precision, so that they may keep fp32 inside."""

log = logging.getLogger(__name__)


def export(
    source: str | Path,
    out: Path,
    *,
    precision: Precision,
    revision: str | None,
    replace: bool,
    tokenizer: str | Path | None,
    prediction_type: str | None,
    vae: str | Path | None,
    variant: str | None,
    textual_inversion: Sequence[str | Path],
    progress: Progress,
) -> Path:
    """Export a checkpoint; see `latentrt.export.export_checkpoint`."""
    with atomic_folder(out, replace=replace) as folder:
        progress("opening the checkpoint", 0, 1)
        checkpoint = open_checkpoint(
            source, revision, tokenizer=tokenizer, prediction_type=prediction_type, vae=vae, variant=variant
        )
        family = family_named(checkpoint.family)
        family.check(checkpoint)
        words = open_words(textual_inversion)
        check_words(checkpoint, words)
        tokens = write_tokenizers(family, checkpoint, folder, words)
        checkpoint = with_words(checkpoint, words, folder / "tokenizer.json")
        builders = family.graphs(checkpoint, precision, {name: info.max_length for name, info in tokens.items()})
        latent = family.latent(checkpoint)
        scheduler, schedule = family.scheduler(checkpoint), family.schedule(checkpoint)
        check_scheduler(scheduler, schedule, (latent.default_width, latent.default_height))
        cells = (latent.default_height // latent.downscale, latent.default_width // latent.downscale)
        graphs, stages = [], len(builders) + 2
        for number, (name, build) in enumerate(builders.items(), start=1):
            progress(name.replace("_", " "), number, stages)
            graphs.append(write_graph(build, folder, precision, cells))
            checkpoint.close()
        graphs.append(write_step_graph(folder, precision, latent.channels))
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
                latent=latent,
                scheduler=scheduler,
                schedule=schedule,
                guidance=family.guidance(checkpoint),
                **(family.defaults(checkpoint) | dict(checkpoint.defaults)),
                files=describe_files(folder),
                source=_provenance(checkpoint, words),
                tools={tool: metadata.version(tool) for tool in TOOLS},
            ),
        )
    progress("done", stages, stages)
    return out


def write_tokenizers(
    family: Family, checkpoint: Checkpoint, folder: Path, words: Sequence[LearnedWord] = ()
) -> dict[str, TokenizerInfo]:
    """Write a checkpoint's tokenizers and return their contracts; `tokenizer_2` feeds `token_ids_2`."""
    lengths, written = family.token_lengths(checkpoint), {}
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
            kind=family.tokenizers[name],
        )
    return written


def write_graph(build: Callable[[], Graph], folder: Path, precision: Precision, cells: tuple[int, int]) -> GraphInfo:
    """Export one graph into `folder`, check it against its module, and describe it.

    Reference rows are recorded at a small size and at `cells`, the latent height and width of the default picture.

    Weights are read one at a time from their files, to compute the references and to write the graph's own.
    """
    graph = build()
    log.info("exporting %s", graph.name)
    with largest_activation(graph.module) as peak:
        cases = reference_cases(graph)
        native = native_case(graph, cells)
    if precision == "fp16" and graph.name in FLOAT_AT_THE_BORDER and peak() > HALF_LIMIT:
        log.warning("%s reaches activations of %.3g, too large for fp16: it stays in fp32", graph.name, peak())
        precision = "fp32"
    if precision == "fp16":
        graph.module.half()
    kinds = {"small": cases[-1]} if native is None else {"small": cases[-1], "native": native}
    references = record(graph, folder, kinds)
    files = save_model(onnx_model(graph), folder / f"{graph.name}.onnx")
    parity = check_parity(graph.name, files[0], cases, precision)
    log.info("%s: relative error %.2g against its module", graph.name, parity.relative_error)
    return GraphInfo(
        name=graph.name,
        stage=graph.stage,
        files=tuple(file.name for file in files),
        inputs=graph.inputs,
        outputs=graph.outputs,
        opset=OPSET,
        precision=precision,
        parity=parity,
        references=references,
        limits=dict(graph.limits),
    )


def write_step_graph(folder: Path, precision: Precision, channels: int) -> GraphInfo:
    """Write the graph that applies the step table; it comes from no module."""
    model = step_graph(precision, channels)
    onnx.save(model, folder / "step.onnx")
    inputs, outputs = tuple(map(_tensor_info, model.graph.input)), tuple(map(_tensor_info, model.graph.output))
    rows = step_rows(precision, channels)
    return GraphInfo(
        name="step",
        stage="step",
        files=("step.onnx",),
        inputs=inputs,
        outputs=outputs,
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        references=(write_reference(folder, "step", inputs + outputs, rows),),
        limits=dict(LIMITS),
    )


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(name=value.name, dtype=dtype, shape=tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))


def _provenance(checkpoint: Checkpoint, words: Sequence[LearnedWord]) -> dict[str, Any]:
    files = {name: sha256_of(file) for name, file in sorted(checkpoint.files.items())}
    source: dict[str, Any] = {"name": checkpoint.name, "revision": checkpoint.revision, "files": files}
    if checkpoint.variant is not None:
        source["variant"] = checkpoint.variant
    if replaced := {name: {"name": o.name, "revision": o.revision} for name, o in checkpoint.replaced.items()}:
        source["replaced"] = replaced
    if words:
        source["textual_inversion"] = provenance(words)
    return source
