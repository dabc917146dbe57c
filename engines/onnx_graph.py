"""ONNX files of a bundle: checked for what they refer to, and read as graphs that can be rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import Bundle, GraphInfo
from .errors import BundleError, EngineError, MissingExtraError, is_out_of_memory, reason

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto


def graph_files(bundle: Bundle, graph: GraphInfo, extra: str) -> list[Path]:
    """Return a graph's files, the ONNX file first, after checking hashes and what the ONNX file refers to.

    Weights outside the ONNX file must be in files that the manifest lists for this graph: a backend reads, and builds
    into its engine, whatever path stands there. Raises `BundleError`, and `MissingExtraError` when the package that
    reads ONNX files is not installed.
    """
    files = [bundle.file(name) for name in graph.files]
    beside = {file.name for file in files[1:] if file.parent == files[0].parent}
    for tensor in _tensors(load_graph(files[0], extra)):
        place = {entry.key: entry.value for entry in tensor.external_data}.get("location")
        if place is not None and place not in beside:
            raise BundleError(
                f"{files[0]} takes weights from {place!r}, which the manifest does not list for graph {graph.name}: "
                "do not use this bundle; export the checkpoint again"
            )
    return files


def load_graph(path: Path, extra: str) -> ModelProto:
    """Read an ONNX file without its external data; `extra` brings the package that this takes.

    Raises `MissingExtraError` when that package is not installed, `BundleError` for a file that is no ONNX, and
    `EngineError` when memory runs out.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(extra, "rewriting a graph for this backend") from error
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class
        if is_out_of_memory(error):
            raise EngineError(f"{path} cannot be read: {reason(error)}") from error
        raise BundleError(f"{path} cannot be read as ONNX ({reason(error)}): export the checkpoint again") from error


def follow_links(model: ModelProto, files: Sequence[Path]) -> Path:
    """Point a graph's weights at the files themselves where a bundle has links, and return the folder they lie in.

    `files` are those of `graph_files`. The hub's cache keeps links, and ONNX Runtime refuses those that leave the
    folder. Raises `BundleError` when the files lie in several folders.
    """
    places = {file.name: file.resolve() for file in files[1:]}
    folders = {place.parent for place in places.values()}
    if len(folders) > 1:
        raise BundleError(f"the files of {files[0]} are links into several folders: copy the bundle with its contents")
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = places[entry.value].name
    return folders.pop() if folders else files[0].parent


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor that a model holds: weights and constants, inside control flow and functions as well."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)
        yield from _tensors_of_attributes(function.attribute_proto)
    for training in model.training_info:
        yield from _tensors_of_graph(training.initialization)
        yield from _tensors_of_graph(training.algorithm)


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(graph)
