"""Noise against torch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latentrt.engines.errors import RequestError
from latentrt.runtime.sampling.noise import Generator, randn

SEEDS = [0, 1, 1234, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
TOLERANCE = 1e-6


def torch_randn(seed: int, *shape: int) -> np.ndarray:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_size_class(seed: int) -> None:
    for count in [*range(1, 41), 100, 1000, 1001, 4095, 4 * 16 * 16, 4 * 64 * 64]:
        values = randn(seed, (count,))
        assert values.dtype == np.float32
        assert np.abs(values - torch_randn(seed, count)).max() <= TOLERANCE, count


def test_shape() -> None:
    assert np.abs(randn(3, (2, 4, 9, 7)) - torch_randn(3, 2, 4, 9, 7)).max() <= TOLERANCE
    assert randn(3, ()).shape == ()
    assert randn(3, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_consecutive_draws_continue_the_stream(seed: int) -> None:
    ours, theirs = Generator(seed), torch.Generator().manual_seed(seed)
    for count in [
        1,
        3,
        1,
        16,
        5,
        17,
        2,
        15,
        15,
        33,
        1,
        1024,
        7,
        100,
        1,
    ]:  # odd short draws keep a spare across long ones
        expected = torch.randn(count, generator=theirs).numpy()
        assert np.abs(ours.randn((count,)) - expected).max() <= TOLERANCE


def test_only_the_low_32_bits_of_a_seed_count_as_in_torch() -> None:
    assert np.array_equal(randn(5, (64,)), randn(5 + 2**32, (64,)))
    assert not np.array_equal(randn(5, (64,)), randn(6, (64,)))


def test_the_extreme_uniforms_stay_finite() -> None:
    values = np.concatenate([randn(seed, (100_000,)) for seed in range(20)])
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 3e-3 and abs(values.std() - 1) < 3e-3


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_seeds_out_of_range_are_refused(seed: object) -> None:
    with pytest.raises(RequestError, match=r"from 0 to 2\^64 - 1"):
        Generator(seed)  # type: ignore[arg-type]
