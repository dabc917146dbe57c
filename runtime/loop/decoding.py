"""How latents become pictures: by which decoder, and in one piece or in tiles.

A tile is as large as the bundle's usual picture, so that it needs no engine of its own, and memory does not grow with
the picture. Tiles overlap. In the middle of what two of them share, the weight of one goes over into that of the other
along a raised cosine; the outermost cells, whose surroundings the decoder did not see, count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle
from ...engines.device import Array
from ...engines.errors import RequestError

DecoderName = Literal["full", "tiny"]
GRAPHS: Mapping[DecoderName, str] = {"full": "decoder", "tiny": "tiny_decoder"}
"""The graph of each decoder."""

NO_WHOLE = "no decoder of {}x{} in one piece has been built, and none may be: the picture is decoded in tiles"
"""What a result says that is decoded in tiles without having been asked for it."""

LEAST_TILE = 64
"""Cells on a side of a tile: in smaller ones its edges are felt everywhere."""
OVERLAP, RAMP = 1 / 4, 1 / 8
"""Parts of a tile's side that neighbours share at least, and over which their weights change."""


@dataclass(frozen=True)
class Decoding:
    """The decoder's graph, and height and width of a tile in latent cells; None: pictures in one piece."""

    graph: str = GRAPHS["full"]
    tile: tuple[int, int] | None = None


WHOLE = Decoding()
"""Pictures in one piece by the checkpoint's own decoder."""


def decodings_of(bundle: Bundle, decoder: str, tiled: bool | None, cells: Sequence[int]) -> tuple[Decoding, ...]:
    """Return how latents of so many cells (height, width) become pictures: the first that there are engines for.

    `tiled` None is in one piece, else in tiles. Raises `RequestError` for a decoder that there is not, or not in this
    bundle.
    """
    if decoder not in get_args(DecoderName):
        raise RequestError(f"decoder is {decoder!r}: choose {' or '.join(get_args(DecoderName))}")
    graph = GRAPHS[decoder]  # type: ignore[index]
    if decoder != "full" and not bundle.has_graph(graph):
        raise RequestError(
            f"decoder is {decoder!r}, and bundle {bundle.path} has none: leave it out, or export the checkpoint again "
            "with --tiny-decoder"
        )
    latent = bundle.manifest.latent
    usual = (latent.default_height // latent.downscale, latent.default_width // latent.downscale)
    height, width = (min(max(LEAST_TILE, side), most) for side, most in zip(usual, cells, strict=True))
    if tiled is False or (height, width) == tuple(cells):
        return (Decoding(graph),)
    in_tiles = Decoding(graph, (height, width))
    return (in_tiles,) if tiled else (Decoding(graph), in_tiles)


def shown_by(bundle: Bundle, decoding: Decoding) -> Decoding:
    """Return how latents on their way are shown that are decoded so: by the tiny decoder where there is one."""
    return replace(decoding, graph=GRAPHS["tiny"]) if bundle.has_graph(GRAPHS["tiny"]) else decoding


def checked_latents(bundle: Bundle, value: Any) -> Array:
    """Return latents [B, C, h, w] of a bundle's models as float32; raises `RequestError` for what is none."""
    channels = bundle.manifest.latent.channels
    try:
        latents = np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # of lists that are no array, and of tensors elsewhere
        raise RequestError(f"latents is a {type(value).__name__} that numpy cannot read: give an array") from error
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.size:
        raise RequestError(f"latents is of shape {list(latents.shape)}: give [images, {channels}, h, w]")
    return latents


def decoded_in_tiles(
    latents: Array, tile: tuple[int, int], decode: Callable[[Array], Mapping[str, Array]]
) -> dict[str, Array]:
    """Return a decoder's outputs for latents [1, C, h, w], of which `decode` takes a tile at a time, all of one shape.

    A picture differs from that in one piece by what its decoder takes from all of it, such as a mean for a norm.
    """
    rows, columns = (_starts(most, side) for most, side in zip(latents.shape[2:], tile, strict=True))
    pixels: npt.NDArray[np.float32] | None = None
    for top, down in rows:
        for left, across in columns:
            part = decode(np.ascontiguousarray(latents[:, :, top : top + tile[0], left : left + tile[1]]))["pixels"]
            scale = part.shape[1] // tile[0]
            if pixels is None:
                size = (latents.shape[2] * scale, latents.shape[3] * scale)
                pixels = np.zeros((1, *size, part.shape[3]), np.float32)
            part *= _ramps(tile[0] * scale, *down, scale)[:, None, None]
            part *= _ramps(tile[1] * scale, *across, scale)[:, None]
            y, x = top * scale, left * scale
            pixels[:, y : y + part.shape[1], x : x + part.shape[2]] += part
    assert pixels is not None
    return {"image": np.rint(pixels * 255).astype(np.uint8), "pixels": pixels}


def _starts(length: int, tile: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the first cell of each tile along an axis, evenly spread, and the cells shared with its neighbours."""
    count = 1 - (tile - length) // round(tile * (1 - OVERLAP))
    starts = [round(index * (length - tile) / max(1, count - 1)) for index in range(count)]
    shared = [0, *(before + tile - after for before, after in pairwise(starts)), 0]
    return [(start, (shared[index], shared[index + 1])) for index, start in enumerate(starts)]


def _ramps(length: int, before: int, after: int, scale: int) -> npt.NDArray[np.float32]:
    """Return the weights of a tile's `length` pixels along an axis, which with those of its neighbours add up to 1.

    It shares so many cells of `scale` pixels with the tiles before and after it.
    """
    weights = np.ones(length, np.float32)
    if before:
        weights[: before * scale] = _ramp(before * scale, length)
    if after:
        weights[-after * scale :] *= 1 - _ramp(after * scale, length)
    return weights


def _ramp(shared: int, length: int) -> npt.NDArray[np.float32]:
    """Return weights that rise from 0 to 1 in the middle of what two tiles share."""
    width = length * RAMP
    position = np.clip((np.arange(shared) + 0.5 - (shared - width) / 2) / width, 0, 1)
    return np.square(np.sin(np.pi / 2 * position)).astype(np.float32)
