"""Every graph of whole models as TensorRT-RTX plans: the embedded model, and SD 1.5 at full width with few layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import SIDECAR, EngineCache
from latentrt.engines.tensorrt.plan import Plan, profile_for
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from latentrt.runtime.shapes import requested_shapes

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=["embedded", "shallow-sd15"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The embedded model in fp32, as it is shipped, and SD 1.5 in fp16; gigabytes, deleted when the tests are done."""
    from latentrt.benchmarks.random_checkpoint import write_random_checkpoint
    from latentrt.export import export_checkpoint
    from latentrt.export.embedded import BUNDLE

    if request.param == "embedded":
        yield Bundle.open(BUNDLE)
        return
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_random_checkpoint("shallow-sd15", folder / "checkpoint", precision="fp16")
    yield Bundle.open(export_checkpoint(checkpoint, folder / "bundle", precision="fp16"))
    shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "capability"), [("static", "8.9"), ("dynamic", "12.0")])
def test_every_graph_compiles(bundle: Bundle, kind: str, capability: str, tmp_path: Path) -> None:
    target = target_of_compute_capability("tensorrt-rtx", capability)
    planner = Planner("tensorrt-rtx", target, cache=EngineCache(tmp_path / "cache"))
    latent = bundle.manifest.latent
    sizes = [(latent.default_width, latent.default_height)]
    if kind == "dynamic":
        sizes.append((latent.default_width // 2, latent.default_height))
    shapes = [requested_shapes(bundle, width, height, 1) for width, height in sizes]
    for graph in bundle.manifest.graphs:
        plan = planner.build(bundle, graph, profile_for(graph, *(each[graph.name] for each in shapes)))
        facts = json.loads((plan.folder / SIDECAR).read_text(encoding="utf-8"))  # as another process reads it
        tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
        assert {name: t["dtype"] for name, t in tensors.items()} == {
            t.name: t.dtype for t in (*graph.inputs, *graph.outputs)
        }
        assert facts["key"]["target"] == {"compute_capability": capability}
        profile = Plan.open(plan.folder).profile
        assert profile.covers(shapes[0][graph.name]) and profile.covers(shapes[-1][graph.name])
        static = all(low == high for low, _, high in profile.ranges.values())
        assert static == (kind == "static" or graph.name == "text_encoder")  # no prompt depends on the size
        assert plan.path.stat().st_size == facts["plan_bytes"] > 0
    assert len(planner.cache.entries()) == len(bundle.manifest.graphs) == 5
    shutil.rmtree(tmp_path / "cache")
