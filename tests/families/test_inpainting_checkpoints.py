"""Checkpoints for inpainting, whose U-Net reads mask and masked picture, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Batcher, Bundle, Pipeline
from latentrt.runtime.service.models import Model, ModelSettings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.export.verify import verify  # noqa: E402

from . import tiny  # noqa: E402
from .compare import check, check_seen, mask, opened, picture  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4, "height": 64, "width": 64}
GIVEN: dict[str, Any] = {"image": picture(), "mask_image": mask(), **QUICK}
SD, XL = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd15(tmp_path_factory.mktemp("nine") / "sd15", SD, in_channels=9)


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.open(export_checkpoint(checkpoint, checkpoint.with_name("bundle")), "onnxruntime-cpu") as found:
        yield found


@pytest.mark.parametrize(
    "request_",
    [
        {},  # from noise alone
        {"strength": 0.6, "negative_prompt": "blue"},
        {"guidance_scale": 1.0, "height": 48, "width": 72},
        {"padding_mask_crop": 4},
    ],
)
def test_pictures_are_those_of_diffusers(checkpoint: Path, pipe: Pipeline, request_: dict[str, Any]) -> None:
    request = {**GIVEN, **request_}
    if "padding_mask_crop" in request:  # which pastes into a picture
        reference = opened(getattr(diffusers, SD), checkpoint)
        wanted = reference(**request, generator=torch.Generator().manual_seed(5)).images[0]
        found = pipe(**request, seed=5).images[0]
        assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).max() <= 2
    else:
        check(pipe, opened(getattr(diffusers, SD), checkpoint), **request)


def test_each_picture_of_a_batch_is_that_of_its_seed(checkpoint: Path, pipe: Pipeline) -> None:
    reference = opened(getattr(diffusers, SD), checkpoint)
    for strength in (0.7, 1.0):
        ours = pipe(**GIVEN, strength=strength, seed=5, num_images_per_prompt=2, output_type="np").images
        for image, seed in zip(ours, (5, 6), strict=True):
            generator = torch.Generator().manual_seed(seed)
            wanted = reference(**GIVEN, strength=strength, generator=generator, output_type="np").images[0]
            assert np.abs(image - wanted).max() * 255 <= 2


def test_several_pictures_from_one_generator(checkpoint: Path, pipe: Pipeline) -> None:
    for strength in (0.7, 1.0):
        request = {**GIVEN, "strength": strength, "num_images_per_prompt": 2, "output_type": "np"}
        wanted = opened(getattr(diffusers, SD), checkpoint)(
            **request, generator=torch.Generator().manual_seed(5)
        ).images
        ours = pipe(**request, generator=torch.Generator().manual_seed(5)).images
        assert np.abs(np.asarray(ours) - wanted).max() * 255 <= 2


def test_mask_and_picture_are_seen(pipe: Pipeline) -> None:
    check_seen(pipe, GIVEN, {"mask_image": picture()}, {"image": mask()})


def test_requests_without_a_mask_are_refused(pipe: Pipeline) -> None:
    for left_out in ("image", "mask_image"):
        given = {name: value for name, value in GIVEN.items() if name not in (left_out, "mask_image")}
        with pytest.raises(RequestError, match="is for inpainting alone: give image and mask_image"):
            pipe(**given)


def test_a_bundle_warms_up_and_is_verified(checkpoint: Path, pipe: Pipeline) -> None:
    pipe.warm_up(sizes=[(32, 32)], batches=[1])
    report = verify(pipe.bundle.path, checkpoint, backend="onnxruntime-cpu", steps=2)
    assert report.within, report


def test_a_batcher_and_a_server_warm_up(pipe: Pipeline) -> None:
    with Batcher(pipe, slots=1) as batcher:
        batcher.warm_up([(32, 32)])
        request = {**GIVEN, "seed": 5, "output_type": "np"}
        found = batcher.submit(**request).result(300).images
        assert np.abs(found - pipe(**request).images).max() <= 1 / 255
    settings = ModelSettings(backend="onnxruntime-cpu", options={"threads": 1}, slots=1, sizes=((32, 32),))
    model = Model("inpainting", pipe.bundle, settings)
    model.open(settings)
    assert model.state == "ready"
    model.close(model.taken())


def test_one_of_a_single_step_warms_up(pipe: Pipeline) -> None:
    """Its own strength may leave no step of one."""
    own = {"default_num_inference_steps": 1, "default_inpainting_strength": 0.9999}
    bundle = Bundle(pipe.bundle.path, pipe.bundle.manifest.model_copy(update=own))
    with Pipeline(bundle, pipe.backend) as few, Batcher(few, slots=1) as batcher:
        few.warm_up([(32, 32)])
        batcher.warm_up([(32, 32)])


@pytest.mark.slow
def test_stable_diffusion_xl(tmp_path: Path) -> None:
    folder = tiny.sdxl(tmp_path / "sdxl", in_channels=9)
    with Pipeline.open(export_checkpoint(folder, tmp_path / "bundle"), "onnxruntime-cpu") as pipe:
        for change in ({}, {"strength": 1.0, "negative_prompt": "x"}):
            check(pipe, opened(getattr(diffusers, XL), folder), **{**GIVEN, "guidance_scale": 5.0, **change})


def test_other_pipelines_with_nine_channels_are_refused(tmp_path: Path) -> None:
    for write, kind in ((tiny.sd15, SD), (tiny.sdxl, XL)):
        folder = write(tmp_path / kind, in_channels=9)
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("Inpaint", ""))
        found = open_checkpoint(folder)
        with pytest.raises(UnsupportedModelError, match="takes 9 and gives 4 channels"):
            family_named(found.family).check(found)
