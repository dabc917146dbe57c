"""Guidance by skipped layers, against diffusers' pipeline of Stable Diffusion 3.5."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import BundleError, RequestError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.engines.tensorrt.step import step_shapes
from latentrt.export import export_checkpoint
from latentrt.runtime import Batcher, Pipeline
from latentrt.runtime.cli import run
from latentrt.runtime.shapes import requested_shapes

from ..engines.simulated_backends import tensorrt_backend
from ..engines.simulated_cuda import SimulatedDriver

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export import exporter  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families.stable_diffusion_3 import FAMILY  # noqa: E402
from latentrt.export.verify import verify  # noqa: E402

from . import tiny_transformers  # noqa: E402
from .compare import check, opened  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

LAYERS = [1, 3]
SKIPPING: dict[str, Any] = {"skip_guidance_layers": LAYERS, "skip_layer_guidance_stop": 0.7}
REQUEST: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 6, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.sd3(tmp_path_factory.mktemp("sd35") / "base", with_t5=False, newer=True, layers=4)


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    bundle = export_checkpoint(checkpoint, checkpoint.with_name("bundle"), skip_layers=LAYERS[::-1])
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return opened(diffusers.StableDiffusion3Pipeline, checkpoint, text_encoder_3=None, tokenizer_3=None)


@pytest.fixture
def plans_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check of new engines, which has tests of its own."""
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)


def latents(pipe: Pipeline, **request: Any) -> Any:
    return pipe(**{**REQUEST, "seed": 3, "output_type": "latent", **request}).images


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"skip_layer_guidance_stop": 0.2},
        {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, "negative_prompt": "blue"},
        {"skip_layer_guidance_start": 0.5, "skip_layer_guidance_stop": 0.9, "skip_layer_guidance_scale": 0.7},
        {"num_images_per_prompt": 2, "negative_prompt": "x", "guidance_scale": 1.5},
        {"prompt": ["a star", "two circles"], "negative_prompt": ["x", "a blue circle"], "width": 48},
        {"guidance_scale": 1.0},
    ],
    ids=str,
)
def test_pictures_are_those_of_diffusers(pipe: Pipeline, reference: Any, request_: dict[str, Any]) -> None:
    check(pipe, reference, **{**REQUEST, **SKIPPING, **request_})


def test_a_sampler_that_asks_twice_a_step_counts_as_diffusers_does(pipe: Pipeline, checkpoint: Path) -> None:
    reference = opened(diffusers.StableDiffusion3Pipeline, checkpoint, text_encoder_3=None, tokenizer_3=None)
    reference.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    check(pipe, reference, sampler="flow_heun", **REQUEST, **SKIPPING)


def test_only_steps_in_the_window_run_a_branch_more(checkpoint: Path, branches_asked: list[int]) -> None:
    with Pipeline.open(checkpoint.with_name("bundle"), "onnxruntime-cpu", threads=1, mode="eager") as pipe:
        latents(pipe, **SKIPPING)
        latents(pipe, **SKIPPING, guidance_interval=(0.0, 0.5))
    assert branches_asked == [2, 3, 3, 3, 3, 2, 2, 3, 3, 1, 1, 1]


def test_it_changes_the_picture_and_a_scale_of_0_does_not(pipe: Pipeline) -> None:
    plain = latents(pipe)
    assert np.abs(latents(pipe, **SKIPPING) - plain).max() > 1e-2
    for idle in (
        {**SKIPPING, "skip_layer_guidance_scale": 0.0},
        {"skip_guidance_layers": [], "skip_layer_guidance_scale": 9.0},
        {**SKIPPING, "skip_layer_guidance_start": 0.9},
    ):
        np.testing.assert_array_equal(latents(pipe, **idle), plain)
    alone = pipe(**REQUEST, **SKIPPING, guidance_scale=1.0)
    assert [text for text in alone.warnings if "no step is guided by it: it changes nothing" in text]


@pytest.mark.parametrize("mode", ["eager", "loop", "request"])
def test_captured_runs_give_the_bits_of_those_of_steps(pipe: Pipeline, checkpoint: Path, mode: Any) -> None:
    settings: list[dict[str, Any]] = [{}, SKIPPING, {**SKIPPING, "skip_layer_guidance_stop": 0.4}]
    wanted = [latents(pipe, **each) for each in settings]
    with Pipeline.open(checkpoint.with_name("bundle"), "onnxruntime-cpu", threads=1, mode=mode) as other:
        for _ in range(3):
            for each, expected in zip(settings, wanted, strict=True):
                np.testing.assert_array_equal(latents(other, **each), expected)


def test_rows_that_skip_nothing_are_the_same_bit_for_bit_beside_one_that_does(pipe: Pipeline) -> None:
    random = np.random.default_rng(0)
    denoiser = pipe.bundle.graph("denoiser")
    known = {"R": 3, "h": 16, "w": 16, "L": 10}
    inputs = {
        spec.name: random.standard_normal([known.get(size, size) for size in spec.shape]).astype(spec.dtype)
        for spec in denoiser.inputs
    }
    found = {}
    for skipped in ([0, 0, 0], [0, 1, 0], [1, 1, 0]):
        inputs["skipped"] = np.array(skipped)
        found[sum(skipped)] = pipe.session._run("denoiser", inputs)["prediction"]
    np.testing.assert_array_equal(found[0][[0, 2]], found[1][[0, 2]])
    np.testing.assert_array_equal(found[0][2], found[2][2])
    np.testing.assert_array_equal(found[1][1], found[2][1])
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-3


def test_embeddings_stand_in_place_of_prompts(pipe: Pipeline) -> None:
    rows = {
        side: pipe.session.encode_prompt(pipe._batches.tokens(*[text] * len(pipe._batches.tokenizers)))
        for side, text in (("", "a red circle"), ("negative_", ""))
    }
    given = {f"{side}prompt_embeds": each["context"] for side, each in rows.items()}
    given |= {f"{side}pooled_prompt_embeds": each["pooled"] for side, each in rows.items()}
    wanted = latents(pipe, **SKIPPING)
    np.testing.assert_allclose(latents(pipe, **{**SKIPPING, **given, "prompt": None}), wanted, atol=1e-4)


def test_a_batcher_draws_what_a_pipeline_draws(pipe: Pipeline) -> None:
    each: list[dict[str, Any]] = [
        {**SKIPPING, "negative_prompt": "blue"},
        {**SKIPPING, "num_images_per_prompt": 2, "skip_layer_guidance_start": 0.4},
        {},
        {**SKIPPING, "guidance_interval": (0.0, 0.5)},
    ]
    with Batcher(pipe, slots=3) as batcher:
        futures = [batcher.submit(**REQUEST, seed=3, output_type="latent", **request) for request in each]
        for request, future in zip(each, futures, strict=True):
            np.testing.assert_allclose(future.result(300).images, latents(pipe, **request), atol=1e-4)
    with Batcher(pipe, slots=2, rows=2) as batcher, pytest.raises(RequestError, match="needs 3 rows"):
        batcher.submit(**REQUEST, **SKIPPING)


def test_other_layers_are_refused_in_a_line(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"^skip_guidance_layers is 2,3: this bundle skips 1,3; give those, or ex"):
        pipe(**REQUEST, skip_guidance_layers=[2, 3])
    with pytest.raises(RequestError, match=r"skip_layer_guidance_stop is 2"):
        pipe(**REQUEST, **{**SKIPPING, "skip_layer_guidance_stop": 2})
    command = ["generate", "a star", "--bundle", str(pipe.bundle.path), "--skip-layers"]
    for words, line in (
        (["2,3"], "--skip-layers is 2,3: this bundle skips 1,3; give those, or export the checkpoint again"),
        (["x"], "--skip-layers is 'x': give whole numbers with commas between them"),
        (["1,3", "--skip-layer-interval", "0.1"], "--skip-layer-interval is '0.1': give two shares, such as 0.01,0.2"),
        (["1,3", "--skip-layer-scale", "-1"], "--skip-layer-scale is -1.0"),
    ):
        assert run(["--quiet", *command, *words]) == 2
        assert line in capsys.readouterr().err


def test_layers_that_are_not_there_are_refused_at_export(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^skip_layers has 4: this transformer has layers 0 to 3, give those$"):
        export_checkpoint(checkpoint, tmp_path / "bundle", skip_layers=[4])
    assert not (tmp_path / "bundle").exists()


def test_a_transformer_that_is_checked_by_few_layers_skips_those_that_were_asked_for(
    checkpoint: Path, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "MOST_AT_FULL_SIZE", 0)
    source = replace(open_checkpoint(checkpoint), skip_layers=tuple(LAYERS))
    lengths = {name: length for name, (length, _) in FAMILY.token_lengths(source).items()}
    (graph,) = exporter.write_network(FAMILY, source, lengths, "denoiser", tmp_path, "fp32")
    assert graph.parity is not None and graph.parity.layers == 2
    assert "skipped" in {spec.name for spec in graph.inputs}
    assert (tmp_path / "denoiser.onnx").read_bytes() == (pipe.bundle.path / "denoiser.onnx").read_bytes()


def test_layers_of_other_families_and_bundles_are_not_skipped(
    tiny_sd15_checkpoint: Path, tiny_sd15_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"^skip_layers is given: layers of Stable Diffusion 1"):
        export_checkpoint(tiny_sd15_checkpoint, tmp_path / "bundle", skip_layers=[1])
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        with pytest.raises(RequestError, match=r"^skip_guidance_layers is given: all layers of this bundle run"):
            pipe("a star", skip_guidance_layers=[7, 8, 9])
        pipe("a star", num_inference_steps=1, skip_guidance_layers=None, skip_layer_guidance_scale=2.8)


def test_medium_has_its_layers_without_being_asked_and_others_have_none() -> None:
    def chosen(layers: int, dual: tuple[int, ...], asked: tuple[int, ...] | None = None) -> tuple[int, ...]:
        config = {"num_layers": layers, "dual_attention_layers": dual}
        checkpoint: Any = SimpleNamespace(config=lambda _: config, skip_layers=asked)
        return FAMILY.skip_layers(checkpoint)

    assert chosen(24, tuple(range(13))) == (7, 8, 9)
    assert chosen(38, ()) == chosen(2, (0,)) == chosen(24, tuple(range(13)), ()) == ()
    assert chosen(38, (), (9, 7, 7)) == (7, 9)


def test_the_manifest_says_what_is_skipped(pipe: Pipeline, tmp_path: Path) -> None:
    assert pipe.bundle.manifest.guidance.skipped is not None
    assert pipe.bundle.manifest.guidance.skipped.layers == tuple(LAYERS)
    manifest = json.loads((pipe.bundle.path / "manifest.json").read_text(encoding="utf-8"))
    for change, message in (({"input": "pooled"}, "no graph 'denoiser' reads 'pooled'"), ({"layers": [3, 1]}, "rise")):
        damaged = json.loads(json.dumps(manifest))
        damaged["guidance"]["skipped"] |= change
        (tmp_path / "manifest.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            type(pipe.bundle).open(tmp_path)


@pytest.mark.usefixtures("plans_are_trusted")
def test_fixed_shapes_have_plans_for_both_numbers_of_rows(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path), SimulatedDriver())
    with Pipeline(pipe.bundle, backend) as fixed:
        for request in ({}, SKIPPING):
            np.testing.assert_allclose(latents(fixed, **request), latents(pipe, **request), atol=1e-4)
        plans = [plan.plan.facts["graph"] for plan in backend._loaded.values()]
    assert plans.count("denoiser") == 2 and plans.count("step") == 2


@pytest.mark.usefixtures("plans_are_trusted")
def test_what_is_built_for_a_server_serves_requests_that_skip_layers(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    tensorrt_backend(monkeypatch, EngineCache(), SimulatedDriver())
    build = ["build", str(pipe.bundle.path), "--backend=tensorrt", "--size=32x32"]
    assert run([*build, "--slots=2", "--rows=4"]) == 0
    backend = tensorrt_backend(monkeypatch, EngineCache(), SimulatedDriver(), build=False)
    with Pipeline(pipe.bundle, backend) as fixed, Batcher(fixed, slots=2, rows=4, build=False) as batcher:
        for request in ({}, SKIPPING):
            found = batcher.submit(**REQUEST, seed=3, output_type="latent", **request).result(300).images
            np.testing.assert_allclose(found, latents(pipe, **request), atol=1e-4)


@pytest.mark.usefixtures("plans_are_trusted")
@pytest.mark.parametrize("rows", [2, 4])
def test_warming_up_builds_for_requests_that_skip_layers_where_they_fit(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    backend = tensorrt_backend(monkeypatch, EngineCache(tmp_path), SimulatedDriver())
    with Pipeline(pipe.bundle, backend) as fixed, Batcher(fixed, slots=1, rows=rows, build=False) as batcher:
        batcher.warm_up([(32, 32)], pictures=False)
        plans = [plan.plan.facts["graph"] for plan in backend._loaded.values()]
        assert (plans.count("denoiser"), plans.count("step")) == (1, 1 if rows == 2 else 2)
        if rows == 4:
            assert batcher.submit(**REQUEST, **SKIPPING).result(300)
        assert len(backend._loaded) == len(plans)


def test_shapes_to_build_for_are_those_of_requests(pipe: Pipeline) -> None:
    step = pipe.bundle.graph("step")
    for skips, branches in ((False, 2), (True, 3)):
        shapes = requested_shapes(pipe.bundle, 32, 32, 2, 7.0, skips=skips)
        assert shapes["denoiser"]["skipped"] == (2 * branches,)
        assert [each["rows_of_image"] for each in step_shapes(step, [shapes["step"]])] == [
            (2, 2),
            (2, branches),
            (2, 1),
        ]


def test_verify_compares_the_rows_that_skip_layers(pipe: Pipeline, checkpoint: Path) -> None:
    report = verify(pipe.bundle.path, checkpoint, backend="onnxruntime-cpu", steps=2)
    assert report.within


def test_build_draws_with_skipped_layers_what_it_builds(
    pipe: Pipeline, branches_asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    build = ["build", str(pipe.bundle.path), "--backend", "onnxruntime-cpu", "--size", "32x32", "--warm"]
    assert run([*build, "--guidance", "4"]) == 0 and set(branches_asked) == {2, 3}
