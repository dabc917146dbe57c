"""How much memory kept shapes may fill: what a caller says, or part of what a GPU has free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import RequestError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Bundle, Pipeline

from ..engines.simulated_backends import tensorrt_backend
from ..engines.simulated_cuda import SimulatedDriver

SMALL: dict[str, Any] = {"prompt": "a star", "seed": 1, "num_inference_steps": 1, "height": 32, "output_type": "latent"}
WIDTHS = (32, 40, 48, 32)


@pytest.mark.parametrize(("budget", "kept"), [(None, [1, 2, 3, 3]), (250, [1, 2, 2, 2]), (100, [1, 1, 1, 1])])
def test_the_least_recently_used_shapes_go_while_memory_is_over_its_budget(
    monkeypatch: pytest.MonkeyPatch, budget: int | None, kept: list[int]
) -> None:
    """A shape takes 100 bytes here, and one alone stays whatever it takes."""
    found: list[int] = []
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, memory_budget=budget) as pipe:
        shapes = pipe.session._workspaces
        monkeypatch.setattr(pipe.backend.device, "bytes_taken", lambda: 100 * len(shapes))
        for width in WIDTHS:
            pipe(width=width, **SMALL)
            found.append(len(shapes))
            assert next(reversed(shapes.values())).loop.latents(0).shape[-1] == width // 8
    assert found == kept


def test_a_gpu_is_filled_to_three_quarters_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path), SimulatedDriver())
    foreign = backend.device.empty((1 << 20,), "uint8")
    free, taken = backend.device.memory_free()[0], backend.device.bytes_taken()
    assert taken >= 1 << 20
    with Pipeline(Bundle.open(BUNDLE), backend) as pipe:
        assert pipe.session._budget == taken + free * 3 // 4
    foreign.close()


@pytest.mark.parametrize("budget", [0, -1, 1.5, "1GB"])
def test_a_budget_is_a_number_of_bytes(budget: Any) -> None:
    with pytest.raises(RequestError, match=r"memory_budget is .*: give bytes, 1 or more, or leave it out"):
        Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, memory_budget=budget)


def test_what_a_shape_binds_for_its_pictures_goes_with_the_shape() -> None:
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1) as pipe:
        pipe.session.kept = 1
        held: list[int] = []
        for width in WIDTHS:
            pipe(**{**SMALL, "height": None}, image=np.zeros((32, width, 3), np.uint8), strength=1.0)
            assert len(pipe.session._shared._bound) == len(pipe.session._workspaces) == 1
            held.append(pipe.backend.device.tensor_bytes())
    assert held[0] == held[-1] < held[1] < held[2]


def test_warm_ups_at_once_keep_their_shapes_and_leave_a_bound() -> None:
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1) as pipe:
        session, most = pipe.session, pipe.session.kept
        one, other = session.keep_all(), session.keep_all()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        for width in range(32, 32 + 8 * (most + 2), 8):
            pipe(width=width, **SMALL)
        assert len(session._workspaces) == most + 2
        other.__exit__(None, None, None)
        assert session.kept == most + 2
        pipe(width=128, **SMALL)
        assert len(session._workspaces) == most + 2
