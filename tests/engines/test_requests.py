"""Whole requests through the GPU backends: on a simulated driver here, and on a GPU with `-m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.runtime.loop.denoise import Mode
from latentrt.runtime.pipeline import Pipeline

from .simulated_backends import ON_A_GPU, SIMULATED, backend_named
from .simulated_cuda import SimulatedDriver

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red star", "seed": 1},
    {"prompt": "a blue dog", "seed": 2, "guidance_scale": 3.0, "sampler": "euler_a"},
    {"prompt": "a cat", "seed": 3, "negative_prompt": "dog"},
]


def pictures(pipe: Pipeline) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(pipe(**r, num_inference_steps=4, output_type="np").images) for r in REQUESTS])


@pytest.fixture(scope="module")
def cpu_pictures(tiny_sd15_bundle: Path) -> np.ndarray[Any, Any]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        return pictures(pipe)


@pytest.fixture(params=[*SIMULATED, *ON_A_GPU])
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Any:
    shared = tmp_path_factory.getbasetemp() / "plans of the GPU backends"
    own = request.param in SIMULATED  # a real plan takes long to build; what stands for one here does not
    return backend_named(request.param, monkeypatch, EngineCache(tmp_path_factory.mktemp("plans") if own else shared))


@pytest.mark.parametrize("mode", ["step", "loop", "request", "low memory"])
def test_requests_give_the_pictures_of_the_cpu_and_captured_ones_the_bits_of_eager_ones(
    tiny_sd15_bundle: Path, cpu_pictures: np.ndarray[Any, Any], backend: Any, mode: str
) -> None:
    if not backend.can_capture and mode in ("loop", "request"):
        pytest.skip(f"engines of {backend.name} cannot be captured")
    bundle = Bundle.open(tiny_sd15_bundle)
    driver = backend.device.activate()._module
    live = driver.live if isinstance(driver, SimulatedDriver) else None
    captured: Mode = "step" if mode == "low memory" else mode  # type: ignore[assignment]
    results = []
    modes: tuple[Mode, ...] = (captured, "eager") if backend.can_capture else ("eager",)
    for each in modes:
        with Pipeline(bundle, backend, mode=each, low_memory=mode == "low memory") as pipe:
            results.append(pictures(pipe))
            if live is not None and each != "eager" and mode != "low memory":
                assert live["executable"] > 0
        assert backend.device.tensor_bytes() == 0
        assert live is None or not any(live[kind] for kind in ("memory", "pinned", "graph", "executable"))
    assert results[0].tobytes() == results[-1].tobytes()
    if live is not None:  # the kernels are the CPU's; what a GPU's are off by is measured by `latentrt verify`
        np.testing.assert_allclose(results[0], cpu_pictures, atol=1e-3)
