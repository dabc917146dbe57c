"""The batcher on a real GPU: the same bits alone and in a crowd, on the backends that machines with one have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.batcher import Batcher

from ..engines.simulated_backends import ON_A_GPU, backend_named
from .requests import alone, mixed


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_crowd_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed(12, most_steps=8, seed=5)
    backend = backend_named(name, monkeypatch, EngineCache(tmp_path))
    with Pipeline(Bundle.open(ensure_bundle()), backend) as pipe:
        for fixed in (True, False):
            with Batcher(pipe, slots=4, fixed_rows=fixed, max_waiting=100) as batcher:
                batcher.warm_up([(64, 64)])
                expected = alone(batcher, requests)
                futures = [batcher.submit(**request) for request in requests]
                for future, images in zip(futures, expected, strict=True):
                    found = future.result(300).images
                    if fixed:
                        np.testing.assert_array_equal(found, images)
                    else:
                        assert np.abs(found - images).max() <= 1 / 255
