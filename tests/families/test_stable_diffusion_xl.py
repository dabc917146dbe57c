"""Stable Diffusion XL against diffusers' own pipelines: base, refiner, and both in one picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families.stable_diffusion_xl import FAMILY  # noqa: E402
from latentrt.export.verify import verify  # noqa: E402

from . import tiny  # noqa: E402
from .compare import check, mask, opened, picture  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(checkpoint, checkpoint.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pipeline]]:
    folder = tiny.sdxl(tmp_path_factory.mktemp("sdxl") / "refiner", refiner=True)
    with Pipeline.open(export_checkpoint(folder, folder.with_name("bundle")), "onnxruntime-cpu") as opened:
        yield folder, opened


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"negative_prompt": "blue"},
        {"negative_prompt": ""},  # which is not zeros, as none is
        {"guidance_scale": 1.0},
        {"height": 72, "width": 96, "negative_prompt": "x", "num_images_per_prompt": 2},
        {"prompt": ["a star", "a blue circle on a red background"], "guidance_scale": 3.0},
        {"prompt_2": "a star", "negative_prompt": "x", "negative_prompt_2": "blue"},
        {"original_size": (100, 50), "crops_coords_top_left": (3, 4), "target_size": (70, 60)},
        {
            "negative_original_size": (10, 20),
            "negative_target_size": (30, 40),
            "negative_crops_coords_top_left": (1, 2),
        },
        {"negative_original_size": (10, 20)},  # alone it is not read
        {"denoising_end": 0.6},
    ],
)
def test_text_to_image(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    check(pipe, opened(diffusers.StableDiffusionXLPipeline, checkpoint), **{**QUICK, **request_})


@pytest.mark.parametrize(
    "request_",
    [
        {"strength": 0.6},
        {"num_inference_steps": 7},  # the default strength
        {"strength": 0.8, "num_images_per_prompt": 2, "negative_prompt": "x", "crops_coords_top_left": (3, 4)},
    ],
)
def test_image_to_image(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    reference = opened(diffusers.StableDiffusionXLImg2ImgPipeline, checkpoint)
    check(pipe, reference, image=picture(), **{**QUICK, **request_})


@pytest.mark.parametrize("request_", [{}, {"strength": 0.7}, {"strength": 1.0, "negative_prompt": "x"}])
def test_inpainting(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    reference = opened(diffusers.StableDiffusionXLInpaintPipeline, checkpoint)
    request = {**QUICK, "guidance_scale": 5.0, **request_}  # its own default is 7.5
    check(pipe, reference, image=picture(), mask_image=mask(), height=64, width=64, **request)


@pytest.mark.slow
def test_verify_gives_the_refiner_a_picture(refiner: tuple[Path, Pipeline]) -> None:
    assert verify(refiner[1].bundle.path, refiner[0], backend="onnxruntime-cpu", steps=2).within


def test_the_refiner_starts_from_a_picture(refiner: tuple[Path, Pipeline]) -> None:
    reference = opened(diffusers.StableDiffusionXLImg2ImgPipeline, refiner[0])
    check(refiner[1], reference, image=picture(), strength=0.6, **QUICK)
    check(
        refiner[1], reference, image=picture(), strength=0.6, aesthetic_score=9.0, negative_aesthetic_score=1.0, **QUICK
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_base_and_refiner_share_a_picture(
    checkpoint: Path, pipe: Pipeline, refiner: tuple[Path, Pipeline], sampler: str
) -> None:
    first = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    second = opened(diffusers.StableDiffusionXLImg2ImgPipeline, refiner[0])
    for each in (first, second):
        each.scheduler = getattr(diffusers, sampler).from_config(each.scheduler.config)
    shared = {"prompt": "a star", "num_inference_steps": 6}
    generator = torch.Generator().manual_seed(3)
    half = first(**shared, denoising_end=0.7, output_type="latent", generator=generator).images
    wanted = second(**shared, denoising_start=0.7, image=half, output_type="latent", generator=generator).images.numpy()
    latents = pipe(**shared, denoising_end=0.7, output_type="latent", seed=3, sampler=sampler).images
    assert np.linalg.norm(latents - half.numpy()) / np.linalg.norm(half.numpy()) < 1e-4
    ours = refiner[1](
        **shared, denoising_start=0.7, image=latents, output_type="latent", seed=3, sampler=sampler
    ).images
    assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.slow
def test_a_scale_that_the_network_reads(tmp_path: Path) -> None:
    folder = tiny.sdxl(tmp_path / "distilled", time_cond_proj_dim=8)
    reference = opened(diffusers.StableDiffusionXLPipeline, folder)
    reference.scheduler = diffusers.LCMScheduler.from_config(reference.scheduler.config)
    drawn = []
    with Pipeline.open(export_checkpoint(folder, tmp_path / "bundle"), "onnxruntime-cpu") as pipe:
        for scale in (8.0, 1.0):
            check(pipe, reference, guidance_scale=scale, sampler="LCMScheduler", **QUICK)
            drawn.append(pipe(guidance_scale=scale, seed=1, output_type="latent", **QUICK).images)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


@pytest.mark.slow
def test_playground(tmp_path: Path) -> None:
    """Its latents are centered, and its scheduler is the one of EDM."""
    folder = tiny.sdxl(
        tmp_path / "playground",
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(sigma_max=80.0, sigma_data=0.5),
        latents={"scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, 3.3, -2.6], "latents_std": [8.4, 5.9, 6.7, 5.2]},
    )
    other = {**QUICK, "guidance_scale": 3.0, "negative_prompt": "blue"}
    with Pipeline.open(export_checkpoint(folder, tmp_path / "bundle"), "onnxruntime-cpu") as pipe:
        check(pipe, opened(diffusers.StableDiffusionXLPipeline, folder), **other)
        reference = opened(diffusers.StableDiffusionXLPipeline, folder)
        reference.scheduler = diffusers.EDMEulerScheduler.from_config(reference.scheduler.config)
        check(pipe, reference, sampler="EDMEulerScheduler", **other)


def test_embeddings_stand_in_place_of_prompts(checkpoint: Path, pipe: Pipeline) -> None:
    reference = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, reference.encode_prompt("a star", negative_prompt="x"), strict=True))
    ours = pipe(num_inference_steps=3, seed=1, output_type="latent", **given).images
    same = pipe("a star", "x", num_inference_steps=3, seed=1, output_type="latent").images
    assert np.abs(ours - same).max() < 1e-4
    with pytest.raises(RequestError, match="prompt_embeds is given without pooled_prompt_embeds"):
        pipe(prompt_embeds=given["prompt_embeds"])


@pytest.mark.parametrize(
    ("prompt", "negative"), [({"prompt": "a star", "prompt_2": "a blue square"}, None), (None, ("x", "two circles"))]
)
def test_each_tokenizer_reads_its_own_text_beside_embeddings(
    checkpoint: Path, pipe: Pipeline, prompt: dict[str, str] | None, negative: tuple[str, str] | None
) -> None:
    reference = opened(diffusers.StableDiffusionXLPipeline, checkpoint)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = dict(zip(names, reference.encode_prompt("a red circle", negative_prompt="gray"), strict=True))
    given = {name: rows for name, rows in encoded.items() if ("negative" in name) == (negative is None)}
    given |= prompt or {}
    given |= dict(zip(("negative_prompt", "negative_prompt_2"), negative or (), strict=False))
    request = {**given, "num_inference_steps": 2, "output_type": "latent"}
    wanted = reference(**request, generator=torch.Generator().manual_seed(3)).images.numpy()
    ours = pipe(**request, seed=3).images
    assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.parametrize("sizes", [{"negative_original_size": (512, 512)}, {"crops_coords_top_left": (64, 0)}])
def test_a_second_stage_has_the_negative_sizes_of_pictures(
    checkpoint: Path, pipe: Pipeline, refiner: tuple[Path, Pipeline], sizes: dict[str, Any]
) -> None:
    half = np.random.default_rng(0).standard_normal((1, 4, 32, 32)).astype(np.float32)
    request = {"prompt": "a star", "num_inference_steps": 4, "denoising_start": 0.7, "output_type": "latent", **sizes}
    for folder, second in ((checkpoint, pipe), refiner):
        reference = opened(diffusers.StableDiffusionXLImg2ImgPipeline, folder)
        seeded = torch.Generator().manual_seed(3)
        wanted = reference(**request, image=torch.from_numpy(half), generator=seeded).images.numpy()
        ours = second(**request, image=half, seed=3).images
        assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.parametrize("zeros", [True, False])
def test_every_number_that_a_graph_reads_is_in_the_manifest(tmp_path: Path, zeros: bool) -> None:
    folder = tiny.sdxl(tmp_path / "distilled", time_cond_proj_dim=8)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    checkpoint = open_checkpoint(folder)
    graphs = FAMILY.graphs(checkpoint, "fp32", {"tokenizer": 77, "tokenizer_2": 77})
    read = {spec.name for name in ("text_encoder", "denoiser") for spec in graphs[name]().inputs}
    given = {"token_ids", "token_ids_2", "model_input", "timestep", "context", "pooled"}
    assert read - given == {info.name for info in FAMILY.inputs(checkpoint)}
    assert ("text_given" in read) == zeros and "guidance" in read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_3": "x"}, "prompt_3 is given: this bundle has nothing that reads it"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale is given"),
        ({"aesthetic_score": 2.0}, "aesthetic_score is given"),
        ({"denoising_start": 0.7}, "give latents"),
        ({"denoising_end": 0.0001}, "leave no step to run"),
        ({"prompt_syntax": "compel"}, "prompt_syntax"),
    ],
)
def test_what_a_bundle_does_not_read_is_refused(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe("a star", num_inference_steps=4, **arguments)


def test_inpainting_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.sdxl(tmp_path / "nine")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    with pytest.raises(UnsupportedModelError, match="takes 9 and gives 4 channels"):
        export_checkpoint(folder, tmp_path / "bundle")
