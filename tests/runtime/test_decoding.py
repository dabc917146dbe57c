"""Tiles against one piece: a plain convolution as the decoder, which sees no further than its kernel."""

from __future__ import annotations

import numpy as np
import pytest
from latentrt.engines.device import Array
from latentrt.runtime.loop.decoding import decoded_in_tiles

SCALE, REACH = 2, 2
KERNEL = np.random.default_rng(0).random((2 * REACH + 1, 2 * REACH + 1)) / (2 * REACH + 1) ** 2


def decode(latents: Array) -> dict[str, Array]:
    """Blur latents [1, C, h, w], with zeros around them, and make a cell four pixels: [1, 2h, 2w, C]."""
    height, width = latents.shape[2:]
    around = np.pad(latents.astype(np.float64), ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH)))
    blurred = sum(
        KERNEL[y, x] * around[:, :, y : y + height, x : x + width]
        for y in range(2 * REACH + 1)
        for x in range(2 * REACH + 1)
    )
    pixels = np.asarray(blurred).transpose(0, 2, 3, 1).repeat(SCALE, 1).repeat(SCALE, 2)
    return {"pixels": pixels.astype(np.float32)}


@pytest.mark.parametrize("height", [64, 65, 96, 100, 113, 160, 200, 257])
@pytest.mark.parametrize(("width", "tile"), [(48, (64, 48)), (128, (64, 96)), (131, (64, 72))])
def test_tiles_are_the_picture_where_a_decoder_sees_no_further_than_they_share(
    height: int, width: int, tile: tuple[int, int]
) -> None:
    latents = np.random.default_rng(height).random((1, 2, height, width)).astype(np.float32)
    seen = []

    def watched(part: Array) -> dict[str, Array]:
        seen.append(part.shape)
        return decode(part)

    found = decoded_in_tiles(latents, tile, watched)
    assert set(seen) == {(1, 2, *tile)}
    np.testing.assert_allclose(found["pixels"], decode(latents)["pixels"], rtol=0, atol=1e-6)
    assert found["image"].dtype == np.uint8
    np.testing.assert_array_equal(found["image"], np.rint(found["pixels"] * 255))


def test_tiles_go_over_into_each_other_without_a_step() -> None:
    """Of tiles that are 0, 1, 2, … all over: no pixel is further from its neighbour than the ramp allows."""
    count = iter(range(100))
    found = decoded_in_tiles(
        np.zeros((1, 1, 200, 64), np.float32),
        (64, 64),
        lambda part: {"pixels": np.full((1, 128, 128, 1), next(count), np.float32)},
    )["pixels"][0, :, 0, 0]
    assert found[0] == 0 and found[-1] == next(count) - 1
    steps = np.diff(found)
    assert steps.min() >= 0 and steps.max() <= np.pi / 2 / 16 + 1e-6  # a raised cosine over an eighth of 128 pixels
