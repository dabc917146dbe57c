"""Device buffers for the images in flight of one size: slots, network rows, and a step for every bucket of rows.

A slot is an image's place in the step graph, a row one of the network's: the index inputs of the step graph connect
them. The rows in use are always the first ones, so a bucket is a prefix of the buffers, and the row of an image that
left is filled by moving the last one. An idle slot holds what it has and reads row 0, which every bucket has. Where
shapes cost nothing a step leaves out idle slots behind the last one in use.

Nothing of an image depends on who else is there: its numbers are the same bit for bit in every slot, every row and any
company, as long as the bucket is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter

import numpy as np

from ...engines.bundle import Bundle
from ...engines.device import Array, Device, Stream, Tensor
from ...engines.engine import BoundEngine
from ..loop import hoisted
from ..loop.denoise import CapturedWork, Mode, OpenEngine, allocate, allocate_like, shapes_of
from ..loop.widths import slots_of_steps
from ..loop.workspace import allocate_outputs
from .prepared import Fit, Parked, Prepared, blank

OF_ROWS = ("model_input", "timestep", "image_of_row", "prediction")
"""The step graph's tensors that a bucket has a prefix of."""


class Slots:
    """Buffers of one fit, and who is in them."""

    def __init__(
        self,
        device: Device,
        bundle: Bundle,
        open_engine: OpenEngine,
        fit: Fit,
        slots: int,
        buckets: Sequence[int],
        *,
        compiles_shapes: bool = True,
        mode: Mode,
        stream: Stream,
    ) -> None:
        """Allocate the buffers; engines are opened and bound when a bucket is first run."""
        self.fit, self.slots, self.buckets = fit, slots, tuple(buckets)
        self._prefixes = slots_of_steps(slots, compiles_shapes=compiles_shapes)
        self._denoiser, self._step = bundle.graph("denoiser"), bundle.graph("step")
        self._device, self._open, self._mode, self._stream = device, open_engine, mode, stream
        self._before = hoisted.of_steps(bundle.manifest)
        self._of_rows = (*(name for name, _ in fit.conditioning), "model_input", "timestep")
        self._rows: list[tuple[int, int]] = []  # slot and branch of every row in use
        self._taken: set[int] = set()  # slots in use
        self._parity = 0
        self._networks: dict[tuple[int, int], tuple[BoundEngine, ...]] = {}
        self._updates: dict[tuple[int, int, int], BoundEngine] = {}
        self._captured = CapturedWork(2 * len(self.buckets) * len(self._prefixes))
        self._views: dict[tuple[str, int, int, int], Tensor] = {}
        state, rest, conditioning = blank(bundle, fit, slots, self.buckets[-1])
        self._rows_of_image = rest["rows_of_image"]
        with ExitStack() as memory:
            self._sets = [allocate_like(device, state, memory), allocate_like(device, state, memory)]
            self._constants = allocate_like(device, rest, memory)
            self._conditioning = allocate_like(device, conditioning, memory)
            network = {**self._conditioning, **{name: self._sets[0][name] for name in ("model_input", "timestep")}}
            outputs = allocate_outputs(device, self._denoiser, network, memory)
            self._outputs, self._constants["prediction"] = outputs, outputs["prediction"]
            self._still = allocate(device, (1, fit.history, *fit.latents), np.float32, memory)
            memory.callback(self._unbind)  # runs first
            self._memory = memory.pop_all()
        try:
            for tensors, arrays in ((self._constants, rest), (self._conditioning, conditioning)):
                for name, array in arrays.items():
                    tensors[name].write(array, stream)
            for each in self._sets:
                for name, array in state.items():
                    each[name].write(array, stream)
            self._still.write(np.zeros(self._still.shape, np.float32), stream)
        except BaseException:
            self.close()
            raise

    @property
    def used(self) -> int:
        """Network rows in use."""
        return len(self._rows)

    def rows_of(self, slot: int) -> list[tuple[int, int]]:
        """Return the rows of a slot, each with its branch."""
        return [(row, branch) for row, (owner, branch) in enumerate(self._rows) if owner == slot]

    def admit(self, image: Prepared, conditioning: Mapping[str, Array], width: int) -> int:
        """Write an image and the last `width` of its rows of conditioning [n, ...] to a free slot, and return that."""
        count = len(next(iter(conditioning.values())))
        slot = self._occupy(image, range(count - width, count), 0)
        here, stream = self._parity, self._stream
        self._part("latents", slot, 1, here).write(image.state["latents"], stream)
        self._part("history", slot, 1, here).copy(self._still, stream)  # weights of 0 do not silence what is not finite
        for row, branch in self.rows_of(slot):
            self._condition(row, branch, conditioning)
            for name in ("model_input", "timestep"):
                self._part(name, row, 1, here).write(image.state[name], stream)
        return slot

    def _condition(self, row: int, branch: int, conditioning: Mapping[str, Array]) -> None:
        for name, array in conditioning.items():
            self._part(name, row, 1).write(array[branch : branch + 1], self._stream)

    def widen(self, slot: int, conditioning: Mapping[str, Array]) -> None:
        """Give an image that has the rows of its other branches that of the first, of its conditioning [n, ...]."""
        (source, _), row = self.rows_of(slot)[0], self.used
        self._rows.append((slot, 0))
        self._condition(row, 0, conditioning)
        for name in ("model_input", "timestep"):  # they are the same in all rows of an image
            self._part(name, row, 1, self._parity).copy(self._part(name, source, 1, self._parity), self._stream)
        self._connect()

    def narrow(self, slot: int) -> None:
        """Let an image go on without the row of its first branch."""
        self._let_go([row for row, branch in self.rows_of(slot) if branch == 0])

    def resume(self, image: Prepared, parked: Parked, done: int) -> int:
        """Let a parked image go on, after `done` steps, in a free slot, and return that; `parked` stays as it is."""
        slot = self._occupy(image, parked.branches, done)
        for name in ("latents", "history"):
            self._part(name, slot, 1, self._parity).copy(parked.tensors[name], self._stream)
        for row, branch in self.rows_of(slot):
            for name in self._of_rows:
                self._part(name, row, 1, self._parity).copy(parked.part(name, branch), self._stream)
        return slot

    def park(self, slot: int, parked: Parked) -> None:
        """Copy what an image has come to, after the steps so far, out of its slot; the slot stays as it is."""
        rows = self.rows_of(slot)
        parked.branches = tuple(branch for _, branch in rows)
        for name in ("latents", "history"):
            parked.tensors[name].copy(self._part(name, slot, 1, self._parity), self._stream)
        for row, branch in rows:
            for name in self._of_rows:
                parked.part(name, branch).copy(self._part(name, row, 1, self._parity), self._stream)

    def parking(self) -> Parked:
        """Allocate a place beside the slots, for one image."""
        counts = {"latents": 1, "history": 1, **dict.fromkeys(self._of_rows, self.fit.branches)}
        whole = {name: self._whole(name, 0) for name in counts}
        shapes = {name: ((counts[name], *tensor.shape[1:]), tensor.dtype) for name, tensor in whole.items()}
        return Parked(self._device, shapes)

    def _occupy(self, image: Prepared, branches: Sequence[int], done: int) -> int:
        """Take a slot and a row for each branch, write what stays the same in all steps of an image, and return it."""
        slot = next(slot for slot in range(self.slots) if slot not in self._taken)
        first, stream = slot * self.fit.table_rows, self._stream
        for name, array in (*image.tables.items(), *image.own.items()):
            if name == "next_rows":
                array = array + first
            self._part(name, slot * len(array), len(array)).write(array, stream)
        self._part("row", slot, 1, self._parity).write(np.array([first + done], np.int64), stream)
        self._rows += [(slot, branch) for branch in branches]
        self._taken.add(slot)
        self._connect()
        return slot

    def release(self, slot: int) -> None:
        """Free a slot and its rows, and park it on a row of the table that holds."""
        self._taken.remove(slot)
        self._part("row", slot, 1, self._parity).write(
            np.array([(slot + 1) * self.fit.table_rows - 1], np.int64), self._stream
        )
        self._let_go([row for row, _ in self.rows_of(slot)])

    def _let_go(self, rows: Sequence[int]) -> None:
        """Free rows, in increasing order: the last ones in use take their places."""
        for row in reversed(rows):
            moved = self._rows.pop()
            if row < self.used:
                for name in self._of_rows:
                    here, last = (self._part(name, each, 1, self._parity) for each in (row, self.used))
                    here.copy(last, self._stream)
                self._rows[row] = moved
        self._connect()

    def _connect(self) -> None:
        """Write which rows belong to which slots."""
        images = np.zeros(self.buckets[-1], np.int64)
        self._rows_of_image[:] = 0
        for row, (slot, _) in enumerate(self._rows):
            images[row] = slot
            self._rows_of_image[slot] = row  # also of branches that weigh 0 and have none
        for row, (slot, branch) in enumerate(self._rows):
            self._rows_of_image[slot, branch] = row
        self._constants["rows_of_image"].write(self._rows_of_image, self._stream)
        self._constants["image_of_row"].write(images, self._stream)

    def before(self, slot: int) -> list[Array]:
        """Wait for the last step, and return what a slot had in it: latents, history, predictions by branch, [1, …].

        They are there until an image comes or goes, or rows change.
        """
        rows = sorted(self.rows_of(slot), key=itemgetter(1))
        found = [self._part(name, slot, 1, 1 - self._parity) for name in ("latents", "history")]
        return [each.read(self._stream) for each in found + [self._part("prediction", row, 1) for row, _ in rows]]

    def write_noise(self, slot: int, noise: Array) -> None:
        """Write what an image draws [C, h, w] for the next step."""
        self._part("noise", slot, 1).write(noise[None, None], self._stream)

    def latents(self, slot: int) -> Array:
        """Wait for the steps so far, and return the latents [1, C, h, w] of a slot."""
        return self._part("latents", slot, 1, self._parity).read(self._stream)

    def bind(self, bucket: int) -> None:
        """Open and bind what steps of a bucket run, on all slots."""
        for parity in (0, 1):
            self._engines(bucket, self.slots, parity)

    def step(self, bucket: int) -> None:
        """Enqueue a step of the slots in use, or of as many as fill the bucket where none is.

        What a step that failed has written is written again by the next one.
        """
        needed = 1 + max(self._taken) if self._taken else min(self.slots, -(-bucket // self.fit.branches))
        key = (bucket, next(each for each in self._prefixes if each >= needed), self._parity)
        enqueue = partial(self._enqueue, self._engines(*key))
        if self._mode == "eager":
            enqueue(self._stream)
        else:
            self._captured.run(key, enqueue, self._stream)
        self._parity = 1 - self._parity

    @staticmethod
    def _enqueue(engines: Sequence[BoundEngine], stream: Stream) -> None:
        for bound in engines:
            bound.enqueue(stream)

    def _engines(self, bucket: int, slots: int, parity: int) -> tuple[BoundEngine, ...]:
        """Return what a step runs, bound to the first rows and slots of one set of buffers, and to the other set."""
        if (bucket, parity) not in self._networks:
            self._networks[bucket, parity] = self._network(bucket, parity)
        if (bucket, slots, parity) not in self._updates:
            self._updates[bucket, slots, parity] = self._update(bucket, slots, parity)
        return *self._networks[bucket, parity], self._updates[bucket, slots, parity]

    def _network(self, bucket: int, parity: int) -> tuple[BoundEngine, ...]:
        rows = {name: self._part(name, 0, bucket) for name in self._conditioning}
        rows |= {name: self._part(name, 0, bucket, parity) for name in ("model_input", "timestep")}
        before = [hoisted.bound_to_rows(self._open, graph, rows) for graph in self._before]
        network = {spec.name: rows[spec.name] for spec in self._denoiser.inputs}
        outputs = {name: self._part(name, 0, bucket) for name in self._outputs}
        return *before, self._open(self._denoiser, shapes_of(network)).bind({**network, **outputs})

    def _update(self, bucket: int, slots: int, parity: int) -> BoundEngine:
        def part(name: str, side: int) -> Tensor:
            return self._part(name, 0, bucket if name in OF_ROWS else self._of_slots(name, slots), side)

        update = {spec.name: part(spec.name, parity) for spec in self._step.inputs}
        engine = self._open(self._step, shapes_of(update))
        return engine.bind({**update, **{f"next_{name}": part(name, 1 - parity) for name in self._sets[0]}})

    def _of_slots(self, name: str, slots: int) -> int:
        """Return how many elements of a tensor's first axis so many slots have."""
        return self._whole(name, 0).shape[0] // self.slots * slots

    def _part(self, name: str, first: int, count: int, parity: int = 0) -> Tensor:
        """Return rows of a tensor, the same view each time: a view has memory of its own to copy through."""
        key = (name, first, count, parity if name in self._sets[0] else 0)
        if key not in self._views:
            self._views[key] = self._whole(name, parity).rows(first, count)
        return self._views[key]

    def _whole(self, name: str, parity: int) -> Tensor:
        return {**self._constants, **self._conditioning, **self._outputs, **self._sets[parity]}[name]

    def _unbind(self) -> None:
        self._captured.close()
        self._networks.clear()
        self._updates.clear()
        while self._views:
            self._views.popitem()[1].close()

    def close(self) -> None:
        """Free buffers and captures; calling it again does nothing."""
        self._memory.close()
