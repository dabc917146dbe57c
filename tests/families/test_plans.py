"""Every graph of every family as TensorRT-RTX plans, and the operations of its denoiser as PyTorch counts them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from latentrt.benchmarks.measure.roofline import graph_cost
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.engines.tensorrt.planner import Planner, target_of_compute_capability
from latentrt.export import export_checkpoint
from latentrt.runtime.shapes import requested_shapes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from . import tiny, tiny_flux, tiny_transformers  # noqa: E402
from .compare import note  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sdxl": (tiny.sdxl, "fp16"),
    "flux": (tiny_flux.flux, "bf16"),
    "klein": (tiny_flux.klein, "bf16"),
    "z-image": (tiny_transformers.z_image, "bf16"),
    "sd3": (tiny_transformers.sd3, "fp16"),
    "sd3.5": (tiny_transformers.sd35, "bf16"),
    "flux2-dev": (tiny_flux.flux2_dev, "bf16"),
    "sdxl-refiner": (partial(tiny.sdxl, refiner=True), "fp16"),
    "sdxl-inpainting": (partial(tiny.sdxl, in_channels=9), "fp16"),
    "sd15": (tiny.sd15, "fp16"),
    "sd15-inpainting": (partial(tiny.sd15, kind="StableDiffusionInpaintPipeline", in_channels=9), "fp16"),
    "sd15-lcm": (partial(tiny.sd15, kind="LatentConsistencyModelPipeline", time_cond_proj_dim=8), "fp16"),
}
"""What writes a tiny checkpoint, and the precision that it is deployed in."""
SIZE = {"width": 96, "height": 64}
GUIDANCE = {"flux": 3.5}
"""Guidance scales, 4 where none is named."""
COUNTED = ("sdxl", "flux", "klein", "z-image", "sd3", "sd3.5", "flux2-dev")
"""Those of them that draw from a text alone, and are unlike the others."""
WITHOUT: dict[str, dict[str, None]] = {"sd3.5": {"text_encoder_3": None, "tokenizer_3": None}}
"""What diffusers' loader is told that a checkpoint does not have."""
PROMPT = "two circles, a star, a square, a triangle and a photo of glass"
"""Of 33 to 64 tokens: diffusers fills those of Z-Image up to the next 32, and a bundle to 64 at least."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The name of a family and a folder with a checkpoint and its bundle, deleted when the tests are done."""
    write, precision = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    export_checkpoint(write(folder / "checkpoint"), folder / "bundle", precision=precision)  # type: ignore[arg-type]
    yield request.param, folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "capability"), [("static", "8.9"), ("dynamic", "12.0")])
def test_every_graph_compiles(family: tuple[str, Path], kind: str, capability: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    bundle = Bundle.open(family[1] / "bundle")
    target = target_of_compute_capability("tensorrt-rtx", capability)
    planner = Planner("tensorrt-rtx", target, cache=EngineCache(tmp_path / "cache"))
    sizes = [(64, 64)] if kind == "static" else [(64, 64), (96, 64)]
    shapes = [requested_shapes(bundle, width, height, 1) for width, height in sizes]
    for graph in bundle.manifest.graphs:
        plan = planner.build(bundle, graph, profile_for(graph, *(each[graph.name] for each in shapes)))
        assert plan.path.stat().st_size == plan.facts["plan_bytes"] > 0
    built = {f"{kind} for {capability}": len(bundle.manifest.graphs)}
    note("plans", family[0], {"precision": bundle.manifest.precision, **built})


def test_operations_of_a_step_are_those_that_pytorch_counts(family: tuple[str, Path]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    name, folder = family
    if name not in COUNTED:
        pytest.skip("it draws from more than a text, or has the network of another")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder / "checkpoint"), **WITHOUT.get(name, {}))
    network: Any = getattr(pipeline, "unet", None) or pipeline.transformer
    forward, counted = network.forward, list[int]()

    def watched(*inputs: Any, **named: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which counts its products
            result = forward(*inputs, **named)
        counted.append(counter.get_total_flops())
        return result

    network.forward = watched
    guidance = GUIDANCE.get(name, 4.0)
    request: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 1, "guidance_scale": guidance, **SIZE}
    pipeline(**request, output_type="latent")
    bundle = Bundle.open(folder / "bundle")
    cost = graph_cost(bundle, "denoiser", batch=1, guidance=guidance, prompt=PROMPT, **SIZE)
    assert cost.operations == pytest.approx(sum(counted), rel=0.02)
