"""What a listener of a request hears of, while its images are drawn.

Events of one request come one after the other, on a thread beside the loop. A listener that is slow misses steps, and
nothing else: of the steps of an image that it has not heard of yet, only the last one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Admitted:
    """Image `index` of the request has a slot for the first time."""

    index: int


@dataclass(frozen=True)
class Stepped:
    """Image `index` has had `done` of its `total` evaluations of the network."""

    index: int
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Previewed:
    """A picture of image `index` on its way, the `number`-th of those asked for, from 1.

    It is what the network's last prediction speaks of: the picture without the noise that is still in the latents.
    """

    index: int
    number: int
    picture: Image.Image


@dataclass(frozen=True, eq=False)
class Drawn:
    """Image `index` is finished: the picture, or the array [...] of the request's `output_type`, and its seed."""

    index: int
    picture: Any
    seed: int


Event = Admitted | Stepped | Previewed | Drawn
Listener = Callable[[Event], object]
"""Is called with each event."""
