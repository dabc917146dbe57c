"""Reference rows: what a bundle keeps to check every engine of a graph by, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..device import Array
from ..engine import shape_of, solve_sizes
from ..errors import BundleError
from .manifest import GraphInfo, ReferenceInfo, TensorInfo
from .reader import Bundle

MAX_BYTES = 1 << 28
"""The largest file of reference rows that is read."""


def write_reference(folder: Path, name: str, specs: Sequence[TensorInfo], arrays: Mapping[str, Array]) -> ReferenceInfo:
    """Write the arrays of a graph's inputs and outputs to `<name>.rows` and return their manifest entry.

    Numbers are stored in the element types of the graph. Raises `ShapeError` when shapes contradict the specs.
    """
    sizes = solve_sizes({spec.name: spec for spec in specs}, {name: array.shape for name, array in arrays.items()})
    file = folder / f"{name}.rows"
    with file.open("wb") as stream:
        for spec in specs:
            stream.write(arrays[spec.name].astype(_stored(spec)).tobytes())
    return ReferenceInfo(file=file.name, sizes=sizes)


def read_reference(bundle: Bundle, graph: GraphInfo, reference: ReferenceInfo) -> dict[str, Array]:
    """Return the inputs and outputs of a graph's reference rows by name.

    Raises `BundleError` when the file was changed, has not the size of these tensors, or holds no finite numbers.
    """
    specs = graph.inputs + graph.outputs
    shapes = [shape_of(spec, reference.sizes) for spec in specs]
    counts = [math.prod(shape) for shape in shapes]
    wanted = sum(count * _stored(spec).itemsize for count, spec in zip(counts, specs, strict=True))
    given = bundle.manifest.files[reference.file].size
    if given != wanted or given > MAX_BYTES:
        most = f", {MAX_BYTES} are allowed" if given == wanted else f" and its tensors take {wanted}"
        raise BundleError(f"{bundle.path / reference.file} has {given} bytes{most}: export the checkpoint again")
    path = bundle.file(reference.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error}): restore the file") from error
    arrays, start = {}, 0
    for spec, shape, count in zip(specs, shapes, counts, strict=True):
        array = np.frombuffer(data, _stored(spec), count, start).reshape(shape).astype(spec.dtype)
        if not np.isfinite(array).all():
            raise BundleError(f"{path} has numbers in {spec.name} that are not finite: export the checkpoint again")
        arrays[spec.name] = array
        start += count * _stored(spec).itemsize
    return arrays


def _stored(spec: TensorInfo) -> np.dtype[np.generic]:
    if spec.dtype == "bool":
        return np.dtype(np.uint8)
    return np.dtype(spec.dtype).newbyteorder("<")
