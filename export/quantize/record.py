"""What a denoiser is called with while pictures are drawn: the rows that it is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...engines.backends import Backend
from ...engines.bundle import Bundle, GraphInfo
from ...engines.device import Array, Stream, Tensor
from ...engines.engine import BoundEngine, Engine, Shapes
from ...engines.progress import Progress
from ...runtime.pipeline import Pipeline

DENOISER = "denoiser"

Call = Mapping[str, Array]
"""Inputs and outputs of the denoiser by name."""

PROMPTS = (
    "a photograph of an old fishing boat on a calm lake at sunrise, mist over the water",
    "portrait of an elderly woman with a red headscarf, soft window light, 85mm",
    "a bowl of ramen with egg and spring onions on a wooden table, seen from above",
    "an isometric drawing of a small house with a garden, pastel colors",
    "a tabby cat asleep on a stack of books",
    "a busy night street in the rain, neon signs, reflections on the asphalt",
    "an oil painting of mountains in autumn, thick brush strokes",
    "macro photograph of a bee on a purple flower",
    "a red circle on a blue background",
    "a white sports car on a coastal road, motion blur",
    "an astronaut riding a horse on the moon, film still",
    "a green square and a yellow triangle on black",
    "the interior of a gothic cathedral, light through stained glass",
    "a child's crayon drawing of a family in front of a tree",
    "a black and white photograph of a jazz trio on a small stage",
    "a golden retriever puppy running through snow",
)
"""What is drawn where no prompts are given: subjects, materials and styles of many kinds."""


@dataclass(frozen=True)
class Recording:
    """One prompt drawn: calls of the denoiser at steps spread over the run, and the picture [H, W, 3]."""

    calls: tuple[Call, ...]
    picture: Array


def record(
    bundle: Bundle, backend: Backend, prompts: Sequence[str], *, steps: int, calls: int, seed: int, progress: Progress
) -> list[Recording]:
    """Draw each prompt alone, with the bundle's own sampler, guidance and size, and keep `calls` calls of each run.

    Prompt i has seed `seed + i`. Which calls are kept moves on with each prompt, so that together they cover the run.
    Raises as a request does.
    """
    tape = _Tape(backend)
    recordings = []
    with Pipeline(bundle, tape, mode="eager") as pipe:
        for number, prompt in enumerate(prompts):
            progress(f"drawing prompt {number + 1}", number, len(prompts))
            tape.calls.clear()
            picture = pipe(prompt, num_inference_steps=steps, seed=seed + number).images[0]
            kept = (
                tape.calls
                if calls >= len(tape.calls)
                else [
                    tape.calls[(number + index * len(tape.calls) // calls) % len(tape.calls)] for index in range(calls)
                ]
            )
            recordings.append(Recording(tuple(kept), np.asarray(picture)))
    return recordings


class _Tape:
    """A backend whose engine of the denoiser keeps what goes in and comes out."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.device, self.lock = backend.name, backend.device, backend.lock
        self.dynamic, self.compiles_shapes = backend.dynamic, backend.compiles_shapes
        self.can_capture = backend.can_capture
        self.prepare = backend.prepare
        self.calls: list[Call] = []

    def open(self, bundle: Bundle, graph: GraphInfo, shapes: Shapes | None = None) -> Engine:
        """Open one graph of a bundle."""
        engine = self._backend.open(bundle, graph, shapes)
        if graph.name != DENOISER:
            return engine
        return _Heard(engine, self.calls)


class _Heard:
    """An engine that keeps every call."""

    def __init__(self, engine: Engine, calls: list[Call]) -> None:
        self._engine, self._calls = engine, calls
        self.name, self.inputs, self.outputs, self.nbytes = engine.name, engine.inputs, engine.outputs, engine.nbytes

    def bind(self, tensors: Mapping[str, Tensor]) -> BoundEngine:
        """Bind inputs and outputs to memory; see `Engine.bind`."""
        return _HeardBinding(self._engine.bind(tensors), tensors, self._calls)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


class _HeardBinding:
    """A binding that keeps every call."""

    def __init__(self, bound: BoundEngine, tensors: Mapping[str, Tensor], calls: list[Call]) -> None:
        self._bound, self._tensors, self._calls = bound, tensors, calls

    def enqueue(self, stream: Stream) -> None:
        """Run, and keep what went in and came out."""
        self._bound.enqueue(stream)
        self._calls.append({name: np.array(tensor.read(stream)) for name, tensor in self._tensors.items()})
