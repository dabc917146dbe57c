"""What ONNX Runtime is told about the GPU, on a simulated driver."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.onnxruntime.cuda import OnnxRuntimeCuda, provider_options
from latentrt.runtime.cli.build import _open_each, _Wanted

from .simulated_backends import onnxruntime_backend
from .small_bundles import WEIGHT, random


@pytest.mark.parametrize(("graphs", "captured"), [("none", "0"), ("onnxruntime", "1")])
def test_a_session_gets_the_gpu_the_stream_and_the_graphs_that_were_asked_for(graphs: str, captured: str) -> None:
    options = provider_options(3, 0x1234, graphs)  # type: ignore[arg-type]
    wanted = {"device_id": "3", "user_compute_stream": str(0x1234), "enable_cuda_graph": captured}
    assert options.items() >= wanted.items()


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_is_exact_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tf32: bool) -> None:
    assert provider_options(0, 1, "none")["use_tf32"] == "0"
    backend = onnxruntime_backend(monkeypatch, **({"tf32": True} if tf32 else {}))
    given: list[str] = []
    real = ort.InferenceSession

    def session(model: object, options: object, providers: list[tuple[str, dict[str, str]]]) -> object:
        given.append(providers[0][1]["use_tf32"])
        return real(model, options, providers)

    monkeypatch.setattr(ort, "InferenceSession", session)
    backend.open(bundle, bundle.graph("first"))
    assert given == ["1" if tf32 else "0"]


def test_captured_work_of_two_bindings_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = onnxruntime_backend(monkeypatch, graphs="onnxruntime")
    numbers = [backend.run_options().get_run_config_entry("gpu_graph_id") for _ in range(2)]
    assert len(set(numbers)) == 2 and "-1" not in numbers
    plain = onnxruntime_backend(monkeypatch).run_options()
    with pytest.raises(RuntimeError, match="gpu_graph_id"):
        plain.get_run_config_entry("gpu_graph_id")


@pytest.mark.parametrize("graphs", ["none", "onnxruntime"])
def test_shapes_cost_a_capture_where_onnxruntime_captures_and_nothing_of_them_is_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    backend = onnxruntime_backend(monkeypatch, graphs=graphs)
    assert backend.compiles_shapes == (graphs == "onnxruntime")
    wanted = [_Wanted(f"{rows} rows", {"first": [{"x": (rows, 8)}]}) for rows in (2, 4)]
    assert [(each.graph, each.requests) for each in _open_each(backend, bundle, wanted)] == [("first", "every size")]


def test_a_run_comes_after_what_the_caller_s_stream_holds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = onnxruntime_backend(monkeypatch)
    x, y = (backend.device.empty((2, 8), np.float32) for _ in "xy")
    engine = backend.open(bundle, bundle.graph("first"))
    run, stream = engine.bind({"x": x, "y": y}), backend.device.stream()
    for seed in (0, 1):
        x.write(random(2, 8, seed=seed), stream)
        run.enqueue(stream)
        result = y.read(backend.stream)  # nothing waits for the caller's own stream
        np.testing.assert_allclose(result, random(2, 8, seed=seed) @ WEIGHT, atol=1e-5)


def test_graphs_of_another_kind_are_refused() -> None:
    with pytest.raises(RequestError, match="graphs is 'ours': choose none, onnxruntime"):
        OnnxRuntimeCuda(graphs="ours")  # type: ignore[arg-type]
