"""`latentrt build`: what it builds, and that those are the shapes of requests. Plans are TensorRT-RTX's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle, GraphInfo
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import BackendUnavailableError, RequestError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from latentrt.runtime.cli import build as build_command
from latentrt.runtime.pipeline import Pipeline

from .simulated_backends import tensorrt_backend
from .simulated_cuda import SimulatedDriver

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RTX = "tensorrt-rtx"


def run_build(bundle: Path, *, size: list[str], batch: list[int], dynamic: bool, capability: str) -> None:
    build_command.build(bundle, "auto", size, batch, dynamic, [capability])


@pytest.mark.long
def test_every_graph_of_a_model_builds(
    tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Static for one GPU, dynamic in size and batch for another; `latentrt build` twice builds once."""
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    bundle = Bundle.open(tiny_sd15_bundle)
    side = bundle.manifest.latent.default_width
    size = f"{side}x{side}"
    run_build(tiny_sd15_bundle, size=[size], batch=[1], dynamic=False, capability="8.6")
    run_build(tiny_sd15_bundle, size=[size, f"{2 * side}x{2 * side}"], batch=[1, 2], dynamic=True, capability="12.0")
    first = capsys.readouterr().out.splitlines()
    static = len(bundle.manifest.graphs) + 2  # text encoder and denoiser also for requests without guidance
    assert len(first) == static + len(bundle.manifest.graphs) and not any("was there" in line for line in first)
    run_build(tiny_sd15_bundle, size=[size], batch=[1], dynamic=False, capability="8.6")
    again = capsys.readouterr().out.splitlines()
    assert len(again) == static and all("was there" in line for line in again)
    for entry in EngineCache().entries():
        graph = bundle.graph(entry["graph"])
        assert {t["name"] for t in entry["tensors"]} == {t.name for t in (*graph.inputs, *graph.outputs)}
    builder = Planner(RTX, target_of_compute_capability(RTX, "12.0"), cache=EngineCache(tmp_path / "engines"))
    between = build_command.requested_shapes(bundle, 2 * side, side, 2)
    for name, wanted in between.items():  # any request within the range is served by the dynamic plans
        plan = builder.plan(bundle, bundle.graph(name), wanted, build=False)
        assert plan.profile != profile_for(bundle.graph(name), wanted)


def test_built_shapes_are_those_that_a_request_asks_for(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_sd15_bundle)
    side = bundle.manifest.latent.default_width
    asked: dict[str, dict[str, tuple[int, ...]]] = {}
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
        backend = pipe.backend
        really_open = backend.open

        def note(bundle: Bundle, graph: GraphInfo, shapes: dict[str, tuple[int, ...]]) -> object:
            asked[graph.name] = {name: tuple(shape) for name, shape in shapes.items()}
            return really_open(bundle, graph, shapes)

        monkeypatch.setattr(backend, "open", note)
        monkeypatch.setattr(backend, "dynamic", False, raising=False)
        picture = np.zeros((side, side, 3), np.uint8)
        steps = bundle.manifest.default_num_inference_steps
        pipe(
            ["a", "b"],
            height=side,
            width=side,
            num_inference_steps=steps,
            image=picture,
            strength=1.0,
            output_type="np",
        )
    assert asked == build_command.requested_shapes(bundle, side, side, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": ["30x32"]}, "width is 30: this bundle needs a multiple of 4"),
        ({"size": ["big"]}, "size is 'big': give WIDTHxHEIGHT"),
        ({"dynamic": True}, "--dynamic needs a range"),
        ({"capability": "9.0"}, "no compute capability '9.0': choose 7.5"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_built(
    tiny_sd15_bundle: Path, arguments: dict[str, object], message: str
) -> None:
    defaults: dict[str, object] = {"size": [], "batch": [], "dynamic": False, "capability": "8.6"}
    with pytest.raises(RequestError, match=message):
        run_build(tiny_sd15_bundle, **{**defaults, **arguments})  # type: ignore[arg-type]


def test_building_for_this_machine_needs_its_gpu(tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "no_driver", lambda: "no NVIDIA driver is installed")
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA driver.*with --compute-capability X\.Y it builds"):
        build_command.build(tiny_sd15_bundle, RTX)


def test_one_plan_for_a_range_is_built_for_the_gpu_of_this_machine(
    tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tensorrt_backend(monkeypatch, EngineCache(tmp_path), SimulatedDriver())
    told: list[bool] = []
    monkeypatch.setattr(build_command, "_open", lambda *given: device)
    monkeypatch.setattr(build_command, "_build", lambda planner, bundle, wanted, dynamic: told.append(dynamic) or ())
    build_command.build(tiny_sd15_bundle, "tensorrt", [], [1, 2], True)
    assert told == [True]
