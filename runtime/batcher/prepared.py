"""What an image brings to a slot, made while it waits: its table region, first latents, noise and the network's rows.

An image's region of the tables has the same shape whatever its sampler: T rows, two branches and H history slots, with
zeros where it needs less. An image without guidance has one network row, which stands for both of its branches, the
first with weight 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ...engines.bundle import Bundle
from ...engines.device import Array
from ...engines.engine import shape_of, solve_sizes
from ...engines.errors import BundleError, RequestError
from ..loop.denoise import STATE
from ..sampling.step_table import StepTable

BRANCHES = 2
TABLE_ROWS, HISTORY = 128, 5
"""A region's least size, which nearly every request fits; others get buffers of their own."""

OF_IMAGES = ("noise", "original", "mask", "rows_of_image", "image_of_row", "prediction")
"""What the step graph reads beside its state and the tables."""


@dataclass(frozen=True)
class Fit:
    """What images have in common that share a set of buffers."""

    latents: tuple[int, int, int]
    conditioning: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape [...] of a row of what the denoiser reads beside latents and timestep."""
    table_rows: int
    history: int


@dataclass(frozen=True)
class Prepared:
    """One image, ready for a slot: host arrays."""

    inputs: Mapping[str, Array]
    """Token ids, numbers and whatever else the prompt graphs or the denoiser read, [G, ...]."""
    state: Mapping[str, Array]
    """Latents [1, C, h, w], and model input [1, C, h, w] and timestep [1] of a row."""
    tables: Mapping[str, Array]
    """Its region of the tables, [T, ...]."""
    own: Mapping[str, Array]
    """`mask` [1, 1, h, w], and `original` [1, 2, C, h, w] where it is used."""
    noise: Array | None
    """What the steps draw, [K, C, h, w], or None."""
    draws: tuple[int | None, ...]
    """Which noise each step uses, None where it draws none."""


def table_names(bundle: Bundle) -> list[str]:
    """Return the step graph's inputs that are tables; raises `BundleError` for a graph that slots cannot feed."""
    graph = bundle.graph("step")
    tables = [spec.name for spec in graph.inputs if spec.shape[0] == "T"]
    known = {*tables, *STATE, *OF_IMAGES}
    per_row = [spec for spec in bundle.graph("denoiser").inputs if spec.shape[:1] != ("R",)]
    steps = [each.name for each in bundle.manifest.graphs if each.stage == "step"]
    strange = [spec.name for spec in graph.inputs if spec.name not in known] + [spec.name for spec in per_row]
    strange += [name for name in steps if name not in ("denoiser", "step")]
    if strange:
        raise BundleError(f"bundle {bundle.path} has {strange[0]!r} in its steps, which is of no image alone: use pipe")
    return tables


def fit_of(bundle: Bundle, inputs: Mapping[str, Array], latents: tuple[int, int, int], table: StepTable) -> Fit:
    """Return what an image of these inputs [G, ...] and this table needs."""
    read = [spec for spec in bundle.graph("denoiser").inputs if spec.name not in STATE]
    shapes = {name: array.shape for name, array in inputs.items()}
    for graph in bundle.manifest.graphs:
        if graph.stage == "prompt" and not all(spec.name in inputs for spec in graph.outputs):
            sizes = solve_sizes({spec.name: spec for spec in graph.inputs}, shapes)
            shapes |= {spec.name: shape_of(spec, sizes) for spec in graph.outputs}
    rows = -(-(len(table) + 1) // TABLE_ROWS) * TABLE_ROWS
    conditioning = tuple((spec.name, tuple(shapes[spec.name][1:])) for spec in read)
    return Fit(latents, conditioning, rows, max(HISTORY, table.history))


def region(arrays: Mapping[str, Array], names: Iterable[str], used: int, fit: Fit) -> dict[str, Array]:
    """Return a batch's tables as one region: T rows, of which the first `used` are its own and the others hold."""
    found: dict[str, Array] = {}
    branches = arrays["rows_of_image"].shape[1]
    if branches > BRANCHES:
        raise RequestError(f"guidance has {branches} branches: a batcher takes {BRANCHES} at most")
    for name in names:
        array = arrays[name][:used]
        if branches < BRANCHES and name in ("weights", "clip_weights"):
            axis = 2 if name == "weights" else 1  # columns: latents, predictions, ...
            array = np.insert(array, [1] * (BRANCHES - branches), 0, axis=axis)
        if name == "weights":
            missing = fit.history + 1 - array.shape[1]
            array = np.pad(array, [(0, 0), (0, missing), (0, missing), *[(0, 0)] * (array.ndim - 3)])
        found[name] = np.concatenate([array, np.repeat(array[-1:], fit.table_rows - used, axis=0)])
    found["noise_index"] = np.zeros_like(found["noise_index"])  # one noise at a time, written before its step
    found["next_rows"] = np.minimum(np.arange(fit.table_rows) + 1, used - 1)
    found["next_rows"][used:] = np.arange(used, fit.table_rows)
    return found


def prepared(
    inputs: Mapping[str, Array], arrays: Mapping[str, Array], table: StepTable, tables: Mapping[str, Array]
) -> Prepared:
    """Return one image of a batch of one; `tables` is its region."""
    count = table.draw_count
    noise = arrays["noise"][0, :count].copy() if count else None
    which = np.cumsum(table.draws) - 1
    draws = tuple(int(last) if drawn else None for last, drawn in zip(which, table.draws, strict=True))
    state = {"latents": arrays["latents"], "model_input": arrays["model_input"][:1], "timestep": arrays["timestep"][:1]}
    own = {"mask": arrays["mask"]}
    if not arrays["mask"].all():
        own["original"] = arrays["original"]
    return Prepared(inputs, state, tables, own, noise, draws)
