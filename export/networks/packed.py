"""Latents as tokens for transformers that see squares of two cells, and where the tokens are: rotary embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [S, D], each number twice."""


def packed(latents: Tensor) -> Tensor:
    """Return squares of latents [R, C, h, w] as tokens [R, h/2·w/2, 4·C]."""
    rows, channels, height, width = latents.shape
    squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(rows, (height // 2) * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens [R, height·width, 4·C] as latents [R, C, 2·height, 2·width]."""
    rows, channels = tokens.shape[0], tokens.shape[2] // 4
    squares = tokens.reshape(rows, height, width, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(rows, channels, 2 * height, 2 * width)


def frequencies(widths: Sequence[int], theta: float) -> list[Tensor]:
    """Return the angle per position of every second pair of numbers of a head, for axes that have `widths` of them.

    They are exact to float32, and constants of a graph: a buffer would be rounded with the network.
    """
    halves = [theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width) for width in widths]
    return [half.float().repeat_interleave(2) for half in halves]


def rotary(positions: Sequence[Tensor], each: Sequence[Tensor]) -> Rotary:
    """Return the rotary embedding of tokens whose positions are [S] on each axis, for its `frequencies`."""
    angles = torch.cat([at[:, None] * own for at, own in zip(positions, each, strict=True)], dim=1)
    return angles.cos(), angles.sin()


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column [height·width] of each token of a picture."""
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    return rows[:, None].expand(height, width).flatten(), columns[None].expand(height, width).flatten()
