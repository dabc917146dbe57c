"""Scheduler configs and sizes of old checkpoints, as diffusers' own pipelines read them from the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from latentrt.export.checkpoints.mended import mended_sample_size  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.runtime.sampling.catalog import SAMPLERS  # noqa: E402

from .loaded import loaded  # noqa: E402

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "silent DDIM": {"_class_name": "DDIMScheduler"},
    "clipping DDIM": {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0},
    "DDIM as it should be": {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1},
    "silent DDPM": {"_class_name": "DDPMScheduler"},
    "silent PNDM": {"_class_name": "PNDMScheduler"},
    "PNDM with Runge-Kutta steps": {"_class_name": "PNDMScheduler", "skip_prk_steps": False, "steps_offset": 2},
    "PNDM with an option of DDIM": {"_class_name": "PNDMScheduler", "clip_sample": True, "skip_prk_steps": True},
    "leading Euler": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "clipping Heun": {"_class_name": "HeunDiscreteScheduler", "clip_sample": True},
    "LCM": {"_class_name": "LCMScheduler", "clip_sample": True},
    "DPM-Solver": {"_class_name": "DPMSolverMultistepScheduler"},
    "options left to the class": {
        "_class_name": "DDIMScheduler",
        "set_alpha_to_one": False,
        "timestep_spacing": "trailing",
        "_use_default_values": ["timestep_spacing", "set_alpha_to_one"],
    },
    "options of nobody": {"_class_name": "EulerDiscreteScheduler", "use_magic": True, "skip_prk_steps": False},
}
PIPELINES = ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]


VERSIONS = [None, "0.3.0", "0.8.1", "0.9.0", "0.10.2", "0.42.1"]


@pytest.fixture(scope="module")
def folder(tiny_sd15_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose configs every test writes anew."""
    return shutil.copytree(tiny_sd15_checkpoint, tmp_path_factory.mktemp("mended") / "checkpoint")


@pytest.fixture(scope="module")
def networks(folder: Path) -> dict[str, Any]:
    """What diffusers' pipelines need beside a scheduler, opened once and handed to each of them."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}


def opened_by_diffusers(folder: Path, pipeline: str, networks: dict[str, Any]) -> Any:
    return getattr(diffusers, pipeline).from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **networks
    )


def rewrite(folder: Path, pipeline: str, config: dict[str, Any], declared: str | None = None) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(BETAS | config))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    index |= {"scheduler": ["diffusers", declared or config["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))


def assert_as_diffusers(folder: Path, pipeline: str, networks: dict[str, Any]) -> None:
    """Compare every option of the scheduler's class with what diffusers' pipeline holds after it opened the folder."""
    opened = open_checkpoint(folder)
    ours = family_named(opened.family).scheduler(opened)
    theirs = opened_by_diffusers(folder, pipeline, networks)
    name = type(theirs.scheduler).__name__
    assert ours["_class_name"] == name
    complete = {**SAMPLERS[name].defaults, **ours}
    for option in SAMPLERS[name].defaults:
        if option in theirs.scheduler.config:
            assert complete[option] == theirs.scheduler.config[option], option
    for option in ("clip_sample", "skip_prk_steps", "steps_offset"):  # what another sampler would take over
        if option in ours:
            assert ours[option] == theirs.scheduler.config[option], option


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_what_the_pipeline_makes_of_them(
    folder: Path, networks: dict[str, Any], config: str, pipeline: str
) -> None:
    rewrite(folder, pipeline, CONFIGS[config])
    assert_as_diffusers(folder, pipeline, networks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("declared", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_index_names_the_scheduler_s_class(folder: Path, networks: dict[str, Any], declared: str) -> None:
    rewrite(folder, PIPELINES[0], {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, declared)
    assert_as_diffusers(folder, PIPELINES[0], networks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [8, 64, 96])
def test_sample_sizes_of_old_versions(folder: Path, networks: dict[str, Any], version: str | None, size: int) -> None:
    rewrite(folder, PIPELINES[0], CONFIGS["DDIM as it should be"])
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"sample_size": size}
    config = {key: value for key, value in config.items() if key != "_diffusers_version"}
    file.write_text(json.dumps(config if version is None else config | {"_diffusers_version": version}))
    kind = diffusers.UNet2DConditionModel
    with torch.device("meta"):  # the config is diffusers' own reading of the file; the weights do not matter
        unet = kind.from_config(kind.load_config(folder / "unet"))
    theirs = opened_by_diffusers(folder, PIPELINES[0], networks | {"unet": unet})
    assert mended_sample_size(open_checkpoint(folder).config("unet")) == theirs.unet.config.sample_size


def test_skipping_layers_of_the_text_encoder_is_having_fewer(folder: Path, tmp_path: Path) -> None:
    """As diffusers' clip_skip: the output of an earlier layer, and the norm behind the last one."""
    copy = shutil.copytree(folder, tmp_path / "checkpoint")
    file = copy / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    ours = loaded(open_checkpoint(copy), "text_encoder")
    theirs = pytest.importorskip("transformers").CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = torch.arange(77)[None]
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True)
        wanted = getattr(theirs, "text_model", theirs).final_layer_norm(states.hidden_states[-2])
        got = ours(ids)[0]
    assert torch.allclose(got, wanted, atol=1e-5) and not torch.allclose(got, states[0], atol=1e-2)
