"""The way of one checkpoint: open it, export and check one network after the other, write the manifest."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace as replace_fields
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch

from ..engines.bundle import (
    FORMAT_VERSION,
    GraphInfo,
    LatentInfo,
    Manifest,
    Precision,
    TensorInfo,
    atomic_folder,
    describe_files,
    sha256_of,
    write_manifest,
)
from ..engines.progress import Progress
from .activations import HALF_LIMIT, largest_activation
from .checkpoint import Checkpoint
from .graph import (
    Graph,
    decoder_graph,
    denoiser_graph,
    denoiser_multiple,
    image_encoder_graph,
    text_encoder_graph,
    vae_factor,
)
from .onnx_writer import OPSET, onnx_model, save_model
from .parity import check_parity, reference_cases
from .sources import open_checkpoint
from .step_graph import step_graph
from .tokenizer import write_tokenizer

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
    progress: Progress,
) -> Path:
    """Export a checkpoint; see `latentrt.export.export_checkpoint`."""
    with atomic_folder(out, replace=replace) as folder:
        progress("opening the checkpoint", 0, 6)
        checkpoint = open_checkpoint(source, revision, tokenizer=tokenizer, prediction_type=prediction_type)
        checkpoint.check()
        text_config = checkpoint.text_encoder.config
        tokens = write_tokenizer(
            checkpoint.tokenizer,
            folder / "tokenizer.json",
            max_length=text_config["max_position_embeddings"],
            vocab_size=text_config["vocab_size"],
            pad_id=checkpoint.pad_id,
        )
        graphs = []
        builders = graph_builders(checkpoint, tokens.max_length, precision)
        for number, (name, build) in enumerate(builders.items(), start=1):
            progress(f"exporting {name}", number, 6)
            graphs.append(write_graph(build, folder, precision))
        graphs.append(write_step_graph(folder, precision, checkpoint.unet.config["in_channels"]))
        progress("hashing", 5, 6)
        write_manifest(
            folder,
            Manifest(
                format_version=FORMAT_VERSION,
                family="stable-diffusion",
                precision=precision,
                graphs=tuple(graphs),
                tokenizers=(tokens,),
                latent=_latent_info(checkpoint),
                scheduler=dict(checkpoint.scheduler),
                **checkpoint.defaults,
                files=describe_files(folder),
                source=_provenance(checkpoint),
                tools={tool: metadata.version(tool) for tool in TOOLS},
            ),
        )
    progress("done", 6, 6)
    return out


def graph_builders(checkpoint: Checkpoint, length: int, precision: Precision) -> dict[str, Callable[[], Graph]]:
    """Return what loads each network of a checkpoint as a graph; `length` is the number of tokens of a prompt."""
    return {
        "text encoder": lambda: text_encoder_graph(checkpoint.load_text_encoder(), length, precision),
        "denoiser": lambda: denoiser_graph(checkpoint.load_unet(), length, precision),
        "decoder": lambda: decoder_graph(checkpoint.load_vae()),
        "image encoder": lambda: image_encoder_graph(checkpoint.load_vae()),
    }


def write_graph(build: Callable[[], Graph], folder: Path, precision: Precision) -> GraphInfo:
    """Export one graph into `folder`, check it against its module, and describe it.

    One copy of the weights is alive at a time: the module is gone before the check maps the exported file.
    """
    graph = build()
    log.info("exporting %s", graph.name)
    with largest_activation(graph.module) as peak:
        cases = reference_cases(graph)
    if precision == "fp16" and graph.name in FLOAT_AT_THE_BORDER and peak() > HALF_LIMIT:
        log.warning("%s reaches activations of %.3g, too large for fp16: it stays in fp32", graph.name, peak())
        precision = "fp32"
    if precision == "fp16":
        graph.module.half()
    files = save_model(onnx_model(graph), folder / f"{graph.name}.onnx")
    graph = replace_fields(graph, module=torch.nn.Identity())
    gc.collect()
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
    )


def write_step_graph(folder: Path, precision: Precision, channels: int) -> GraphInfo:
    """Write the graph that applies the step table; it comes from no module."""
    model = step_graph(precision, channels)
    onnx.save(model, folder / "step.onnx")
    return GraphInfo(
        name="step",
        stage="step",
        files=("step.onnx",),
        inputs=tuple(map(_tensor_info, model.graph.input)),
        outputs=tuple(map(_tensor_info, model.graph.output)),
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
    )


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(name=value.name, dtype=dtype, shape=tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))


def _latent_info(checkpoint: Checkpoint) -> LatentInfo:
    unet, vae = checkpoint.unet.config, checkpoint.vae.config
    factor, size = vae_factor(vae), unet.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    return LatentInfo(
        channels=unet["in_channels"],
        downscale=factor,
        size_multiple=factor * denoiser_multiple(unet),
        default_height=height * factor,
        default_width=width * factor,
    )


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    files = {name: sha256_of(file) for name, file in sorted(checkpoint.files.items())}
    return {"name": checkpoint.name, "revision": checkpoint.revision, "files": files}
