"""Where a request's noise comes from: a seed for each image, or generators that a caller hands over.

A generator is any object with torch's `get_state`, `set_state` and `initial_seed`: latentrt reads the state of torch's
CPU generator, draws on from there, and writes back where it stopped, so that a generator gives the same numbers here
and in diffusers however often it has been used. PyTorch is not imported.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.errors import RequestError
from ..sampling.noise import Generator

STATE = struct.Struct("<QiiQ624Q3di4xf?3x")
"""torch's CPUGeneratorImplState: seed, left, seeded, next, 624 words, three doubles and their flag (53-bit normals),
the spare float normal and its flag."""

WORDS = 624


@dataclass(frozen=True)
class Noise:
    """The noise of a request: one source for each image, or a single one that all of its images share.

    A shared source draws as diffusers does for a batch: each tensor for all images at once. Sources are seeds or
    generators of the caller.
    """

    sources: tuple[Any, ...]
    shared: bool = False

    @property
    def seeds(self) -> list[int]:
        """The seed that each source began with."""
        return [source if isinstance(source, int) else int(source.initial_seed()) for source in self.sources]


def noise_of(generator: Any, images: int) -> Noise:
    """Return the noise that `generator=` stands for: a generator of the caller, or one for each image.

    Raises `RequestError` for a wrong number of them, and for what is not on the CPU.
    """
    many = isinstance(generator, list | tuple)
    sources = tuple(generator) if many else (generator,)
    for source in sources:
        check_generator(source)
    if many and len(sources) != images:
        raise RequestError(f"generator is a list of {len(sources)}: give one for each of the {images} images")
    return Noise(sources, shared=not many and images > 1)


def check_generator(source: Any) -> None:
    """Raise `RequestError` unless an object's noise can be drawn."""
    kind = f"{type(source).__module__}.{type(source).__name__}"
    if not all(hasattr(source, name) for name in ("initial_seed", "get_state", "set_state")):
        raise RequestError(f"generator is a {kind}: give a torch.Generator, a seed, or a list with one for each image")
    device = str(getattr(source, "device", "cpu"))
    if device != "cpu":
        raise RequestError(
            f"generator is on {device}, whose noise only that device draws: give one of the CPU, or latents="
        )
    if len(_state(source)) != STATE.size:
        raise RequestError(f"the state of generator ({kind}) is not that of PyTorch's CPU generator: give a seed")


def start(generator: Generator, source: Any) -> None:
    """Make a generator begin where a source stands."""
    if isinstance(source, int):
        generator.restart(source)
    else:
        seed, left, _, following, *rest = STATE.unpack(_state(source).tobytes())
        words, (spare, has_spare) = rest[:WORDS], (rest[WORDS + 1], rest[WORDS + 3])
        position = WORDS if left == 1 else following
        generator.resume(seed, np.array(words, np.uint32), position, spare if has_spare else None)


def stop(generator: Generator, source: Any) -> None:
    """Leave a caller's generator where the drawing ended; a seed is left alone."""
    if isinstance(source, int):
        return
    state = source.get_state()
    view = _bytes(state)
    fields = list(STATE.unpack(view.tobytes()))
    words, position, spare = generator.state()
    fields[1], fields[3] = WORDS + 1 - position, position
    fields[4 : 4 + WORDS] = [int(word) for word in words]
    fields[4 + WORDS + 1], fields[4 + WORDS + 3] = spare or 0.0, int(spare is not None)
    view[:] = np.frombuffer(STATE.pack(*fields), np.uint8)
    source.set_state(state)


def _state(source: Any) -> npt.NDArray[np.uint8]:
    return _bytes(source.get_state())


def _bytes(state: Any) -> npt.NDArray[np.uint8]:
    """Return a view of a state's bytes; torch's tensors of the CPU share their memory."""
    return np.asarray(state, np.uint8)
