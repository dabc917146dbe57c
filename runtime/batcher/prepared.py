"""What an image brings to a slot, made while it waits: its table region, first latents, noise and the network's rows.

And what it has when it has left its slot, to go on later.

An image's region of the tables has the same shape whatever its sampler: T rows, two branches and H history slots, with
zeros where it needs less. An image without guidance has one network row, which stands for both of its branches, the
first with weight 0. Images that skip layers have three branches, and buffers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle
from ...engines.device import Array, Device, Tensor
from ...engines.engine import shape_of, solve_sizes
from ...engines.errors import BundleError
from ..loop import hoisted
from ..loop.denoise import STATE, allocate
from ..sampling.noise import Generator
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
    branches: int


class StepNoise:
    """What the steps of an image draw, one after the other: hundreds of megabytes, were it drawn while images wait."""

    def __init__(self, draws: Sequence[int], source: Array | Generator) -> None:
        """`draws` says how many tensors each step draws, of which it uses the last.

        `source` is what was drawn, [K, C, h, w], or what draws them.
        """
        self._draws = tuple(map(int, draws))
        self._source, self._last = source, np.cumsum(self._draws) - 1
        self._step = -1
        self._values: Array | None = None

    def at(self, step: int, shape: Sequence[int]) -> Array | None:
        """Return what a step uses [C, h, w], None where it draws nothing; again for the same step, or for the next."""
        if not self._draws[step]:
            return None
        if not isinstance(self._source, Generator):
            return self._source[self._last[step]]
        for _ in range(self._draws[step] if step != self._step else 0):
            self._values = self._source.randn(shape)
        self._step = step
        return self._values


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
    noise: StepNoise


class Parked:
    """What an image that left its slot has come to, beside the slots on the device: a place for one image."""

    def __init__(self, device: Device, shapes: Mapping[str, tuple[Sequence[int], npt.DTypeLike]]) -> None:
        """Allocate tensors of these shapes and types; those of network rows have as many as branches."""
        self.branches: tuple[int, ...] = ()
        """Of the image's network rows."""
        with ExitStack() as memory:
            self.tensors = {name: allocate(device, shape, dtype, memory) for name, (shape, dtype) in shapes.items()}
            self._memory = memory.pop_all()

    def part(self, name: str, branch: int) -> Tensor:
        """Return what belongs to one network row."""
        return self.tensors[name].rows(branch, 1)

    def close(self) -> None:
        """Free the memory; calling it again does nothing."""
        self._memory.close()


def table_names(bundle: Bundle) -> list[str]:
    """Return the step graph's inputs that are tables; raises `BundleError` for a graph that slots cannot feed."""
    graph = bundle.graph("step")
    tables = [spec.name for spec in graph.inputs if spec.shape[0] == "T"]
    known = {*tables, *STATE, *OF_IMAGES}
    network = (bundle.graph("denoiser"), *hoisted.of_request(bundle.manifest))
    per_row = [spec for graph in network for spec in graph.inputs if spec.shape[:1] != ("R",)]
    steps = [each.name for each in bundle.manifest.graphs if each.stage == "step"]
    strange = [spec.name for spec in graph.inputs if spec.name not in known] + [spec.name for spec in per_row]
    strange += [name for name in steps if name not in ("denoiser", "step", hoisted.MODULATION)]
    if strange:
        raise BundleError(f"bundle {bundle.path} has {strange[0]!r} in its steps, which is of no image alone: use pipe")
    return tables


def blank(
    bundle: Bundle, fit: Fit, slots: int, rows: int
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Return what idle slots start with: state, the step's other inputs, and conditioning."""
    denoiser, step, before = bundle.graph("denoiser"), bundle.graph("step"), hoisted.of_steps(bundle.manifest)
    network = {spec.name: spec.dtype for graph in (*before, denoiser) for spec in graph.inputs}
    total, cells = slots * fit.table_rows, fit.latents[1:]
    sizes = {"T": total, "P": 1 + fit.history, "K": 3 + fit.branches + fit.history, "L": 1 + fit.branches}
    specs = {spec.name: spec for spec in step.inputs}
    shapes = {
        name: tuple(sizes[size] if isinstance(size, str) else size for size in specs[name].shape)
        for name in table_names(bundle)
    }
    tables: dict[str, Array] = {name: np.zeros(shape, specs[name].dtype) for name, shape in shapes.items()}
    tables["weights"][:, 0, 0] = 1  # latents stay what they are
    tables["next_rows"][:] = np.arange(total)
    state: dict[str, Array] = {
        "latents": np.zeros((slots, *fit.latents), np.float32),
        "history": np.zeros((slots, fit.history, *fit.latents), np.float32),
        "model_input": np.zeros((rows, *fit.latents), network["model_input"]),
        "timestep": np.zeros(rows, np.float32),
        "row": np.arange(slots, dtype=np.int64) * fit.table_rows,
    }
    rest = tables | {
        "rows_of_image": np.zeros((slots, fit.branches), np.int64),
        "image_of_row": np.zeros(rows, np.int64),
        "noise": np.zeros((slots, 1, *fit.latents), np.float32),
        "original": np.zeros((slots, 2, *fit.latents), np.float32),
        "mask": np.ones((slots, 1, *cells), bool),
    }
    conditioning: dict[str, Array] = {
        name: np.zeros((rows, *shape), network[name])
        for name, shape in (*fit.conditioning, *hoisted.modulation_of(denoiser))
    }
    return state, rest, conditioning


def fit_of(bundle: Bundle, inputs: Mapping[str, Array], latents: tuple[int, int, int], table: StepTable) -> Fit:
    """Return what an image of these inputs [G, ...] and this table needs."""
    read = hoisted.row_conditioning(bundle.manifest)
    shapes = {name: array.shape for name, array in inputs.items()}
    for graph in bundle.manifest.graphs:
        if graph.stage in ("prompt", "request") and not all(spec.name in inputs for spec in graph.outputs):
            sizes = solve_sizes({spec.name: spec for spec in graph.inputs}, shapes)
            shapes |= {spec.name: shape_of(spec, sizes) for spec in graph.outputs}
    rows = -(-(len(table) + 1) // TABLE_ROWS) * TABLE_ROWS
    conditioning = tuple((spec.name, tuple(shapes[spec.name][1:])) for spec in read)
    return Fit(latents, conditioning, rows, max(HISTORY, table.history), BRANCHES + table.skips)


def region(arrays: Mapping[str, Array], names: Iterable[str], used: int, fit: Fit) -> dict[str, Array]:
    """Return a batch's tables as one region: T rows, of which the first `used` are its own and the others hold."""
    found: dict[str, Array] = {}
    missing_branches = fit.branches - arrays["rows_of_image"].shape[1]
    for name in names:
        array = arrays[name][:used]
        if missing_branches and name in ("weights", "clip_weights"):
            axis = 2 if name == "weights" else 1  # columns: latents, predictions, ...
            array = np.insert(array, [1] * missing_branches, 0, axis=axis)
        if name == "weights":
            missing = fit.history + 1 - array.shape[1]
            array = np.pad(array, [(0, 0), (0, missing), (0, missing), *[(0, 0)] * (array.ndim - 3)])
        found[name] = np.concatenate([array, np.repeat(array[-1:], fit.table_rows - used, axis=0)])
    found["noise_index"] = np.zeros_like(found["noise_index"])  # one noise at a time, written before its step
    found["next_rows"] = np.minimum(np.arange(fit.table_rows) + 1, used - 1)
    found["next_rows"][used:] = np.arange(used, fit.table_rows)
    return found


def prepared(
    inputs: Mapping[str, Array], arrays: Mapping[str, Array], noise: StepNoise, tables: Mapping[str, Array]
) -> Prepared:
    """Return one image of a batch of one; `tables` is its region."""
    state = {"latents": arrays["latents"], "model_input": arrays["model_input"][:1], "timestep": arrays["timestep"][:1]}
    own = {"mask": arrays["mask"]}
    if not arrays["mask"].all():
        own["original"] = arrays["original"]
    return Prepared(inputs, state, tables, own, noise)


def without_draws(table: StepTable) -> StepTable:
    """Return a table whose steps draw nothing, the same one each time: what is packed of it is kept."""
    if not table.draw_count:
        return table
    if table not in _WITHOUT_DRAWS:
        _WITHOUT_DRAWS[table] = replace(table, draws=np.zeros_like(table.draws))
    return _WITHOUT_DRAWS[table]


_WITHOUT_DRAWS: WeakKeyDictionary[StepTable, StepTable] = WeakKeyDictionary()
