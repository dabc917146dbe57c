"""A graph run piece by piece on the CPU, so that memory holds the weights of one piece at a time.

ONNX Runtime has no kernels in half precision there: it makes float32 copies of the weights, and for a network of
billions of them those are more memory than the network itself.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

M_MMAP_THRESHOLD, LARGE_BLOCK, LEARNED = -3, 1 << 20, 32 << 20
"""glibc's name of an option, and values: blocks of more bytes have pages of their own, which a free gives back. The
second is what glibc itself learns, at most, from the blocks that a program frees."""

MOST_BYTES = 1 << 30
"""Bytes of weights, as they are stored, after which a piece ends."""


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Let the allocator return large blocks to the system as soon as they are free, inside the block.

    glibc learns from the first large blocks that are freed to keep those of up to 32 MiB, and weights come and go one
    at a time here. Behind it, it keeps them again: a program that draws pictures has use for them. Other systems'
    allocators stay as they are.
    """
    _set_threshold(LARGE_BLOCK)
    try:
        yield
    finally:
        _set_threshold(LEARNED)


def _set_threshold(size: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def run_in_pieces(
    file: Path, cases: Sequence[Mapping[str, np.ndarray]], most: int = MOST_BYTES
) -> list[list[np.ndarray]]:
    """Run a graph on each case, inputs by name, and return its outputs in the graph's order.

    Weights stay memory-mapped. A graph with fewer than `most` bytes of them is one piece.
    """
    model = onnx.load(file, load_external_data=False)
    pieces, outputs = _pieces(model.graph, most), [value.name for value in model.graph.output]
    held = [dict(case) for case in cases]
    for number, nodes in enumerate(pieces):
        read = {name for node in nodes for name in _reads(node)}
        later = {name for piece in pieces[number + 1 :] for node in piece for name in _reads(node)} | set(outputs)
        given = {name: [values[name] for values in held] for name in read if name in held[0]}
        made = [name for node in nodes for name in node.output if name in later]
        session = _session(_piece(model, nodes, read, given, made), file.parent)
        for values in held:
            found = session.run(made, {name: values[name] for name in given})
            values.update(zip(made, found, strict=True))
            for name in set(values) - later:
                del values[name]
        del session  # before the next one is there
    return [[values[name] for name in outputs] for values in held]


def _pieces(graph: onnx.GraphProto, most: int) -> list[list[onnx.NodeProto]]:
    """Split the nodes, which are in the order of a run, where so many bytes of weights are read."""
    sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    pieces: list[list[onnx.NodeProto]] = [[]]
    read = 0
    for node in graph.node:
        own = sum(sizes.get(name, 0) for name in _reads(node))
        if own and read and read + own > most:
            pieces.append([])
            read = 0
        pieces[-1].append(node)
        read += own
    return pieces


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names of what a node reads, those of its branches' nodes included."""
    inner = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    return {*node.input, *(name for graph in inner for each in graph.node for name in _reads(each))}


def _piece(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    read: set[str],
    given: Mapping[str, Sequence[np.ndarray]],
    made: Sequence[str],
) -> bytes:
    """Return some nodes as a model of their own; the types of its inputs are those of the values that it gets.

    Sizes that all of them have are told: ONNX Runtime takes those of attention for others where it knows none.
    """
    inputs = []
    for name, (first, *others) in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(first.dtype)
        shape = [n if all(other.shape[axis] == n for other in others) else None for axis, n in enumerate(first.shape)]
        inputs.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    types = {value.name: value for value in model.graph.output}
    outputs = [types.get(name, onnx.ValueInfoProto(name=name)) for name in made]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    graph = onnx.helper.make_graph(nodes, model.graph.name or "piece", inputs, outputs, weights)
    piece = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
    return bytes(piece.SerializeToString())


def _session(model: bytes, folder: Path) -> Any:
    """Open a graph without optimizations and without repacking its weights, so that they stay memory-mapped."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # they keep what a run has once held
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
