"""Graphs of the stage "request" and what follows from them: work that the denoiser does not do in every step.

They run once for a request, before its first step. Those that read `row_timesteps` write a row for every step of every
row of the network, `modulations` [R, T, F], and the graph `modulation` picks the step's, [R, F], by the counter that is
on the device. What the others write is conditioning.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...engines.bundle import GraphInfo, Manifest, TensorInfo
from ...engines.device import Array, Tensor
from ...engines.engine import BoundEngine
from ..sampling.step_table import StepTable
from .denoise import STATE, OpenEngine, shapes_of

ROW_TIMESTEPS, MODULATIONS, MODULATION = "row_timesteps", "modulations", "modulation"

STEP_BUCKET = 16
"""The number of timesteps is rounded up to this, so that requests with other step counts use the same engines."""


def of_request(manifest: Manifest) -> list[GraphInfo]:
    """Return the graphs that run once for a request, before its first step."""
    return [graph for graph in manifest.graphs if graph.stage == "request"]


def reads_timesteps(graph: GraphInfo) -> bool:
    """Tell whether a graph of a request writes what each step picks its row of."""
    return any(spec.name == ROW_TIMESTEPS for spec in graph.inputs)


def of_steps(manifest: Manifest) -> list[GraphInfo]:
    """Return those that run in every step where rows are at steps of their own, each for its one timestep."""
    return [graph for graph in of_request(manifest) if reads_timesteps(graph)]


def bound_to_rows(open_engine: OpenEngine, graph: GraphInfo, rows: Mapping[str, Tensor]) -> BoundEngine:
    """Return such a graph bound between tensors of the network's rows, `timestep` [R] and `modulation` [R, F] too."""
    timestep, modulation = rows["timestep"], rows[MODULATION]
    tensors = {**rows, ROW_TIMESTEPS: timestep.shaped((*timestep.shape, 1))}
    inputs = {spec.name: tensors[spec.name] for spec in graph.inputs}
    outputs = {MODULATIONS: modulation.shaped((modulation.shape[0], 1, modulation.shape[1]))}
    return open_engine(graph, shapes_of(inputs)).bind({**inputs, **outputs})


def modulation_of(denoiser: GraphInfo) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of a row of what the denoiser reads for a step, where it reads any."""
    return [(spec.name, (int(spec.shape[1]),)) for spec in denoiser.inputs if spec.name == MODULATION]


def picks(manifest: Manifest) -> list[GraphInfo]:
    """Return the graph that picks a step's row, where there is one."""
    return [graph for graph in manifest.graphs if graph.name == MODULATION]


def conditioning(manifest: Manifest) -> list[TensorInfo]:
    """Return what a request's graphs and the denoiser read beside latents and timesteps, and do not write."""
    graphs = of_request(manifest)
    own = {spec.name for graph in graphs for spec in graph.outputs}
    return [spec for spec in _read(manifest, graphs) if spec.name not in own]


def row_conditioning(manifest: Manifest) -> list[TensorInfo]:
    """Return what is read of each row of the network in every step, where each step computes its own modulation."""
    return _read(manifest, of_steps(manifest))


def _read(manifest: Manifest, graphs: list[GraphInfo]) -> list[TensorInfo]:
    denoiser = [graph for graph in manifest.graphs if graph.name == "denoiser"]
    found = {spec.name: spec for graph in (*denoiser, *graphs) for spec in graph.inputs}
    return [spec for name, spec in found.items() if name not in (*STATE, ROW_TIMESTEPS, MODULATION)]


def row_timesteps(manifest: Manifest, table: StepTable, rows: int) -> dict[str, Array]:
    """Return the timesteps of the network's rows [R, T], the last one repeated; nothing where no graph reads them."""
    if not of_steps(manifest):
        return {}
    padded = np.minimum(np.arange(-(-len(table) // STEP_BUCKET) * STEP_BUCKET), len(table) - 1)
    timesteps = table.timesteps.astype(np.float32)[padded]
    return {ROW_TIMESTEPS: np.ascontiguousarray(np.broadcast_to(timesteps, (rows, len(timesteps))))}


def at_one_step(timestep: Array) -> dict[str, Array]:
    """Return what the graphs of a request and the one that picks read of rows [R] that have one step each."""
    return {ROW_TIMESTEPS: timestep[:, None], "row": np.zeros(1, np.int64)}
