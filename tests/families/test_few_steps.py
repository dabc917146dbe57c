"""Checkpoints distilled to few steps: what a request gets that names neither steps nor guidance."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import RequestError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402

from . import tiny  # noqa: E402
from .compare import check, opened  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULERS: dict[str, tuple[dict[str, Any], bool]] = {
    "SDXL-Turbo": ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, True),
    "Lightning": ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, False),
    "LCM": ({"_class_name": "LCMScheduler"}, True),
    "Hyper": ({"_class_name": "TCDScheduler"}, True),
    "ordinary": ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, False),
    "ancestral": ({"_class_name": "EulerAncestralDiscreteScheduler"}, False),
    "from pure noise": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        },
        False,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("few")
    return [tiny.sd15(folder / "sd15"), tiny.sdxl(folder / "sdxl")]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_that_give_them_away(folders: list[Path], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    config, few = SCHEDULERS[kind]
    caplog.set_level(logging.WARNING)
    for folder in folders:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"scheduler": ["diffusers", config["_class_name"]]})
        )
        found = open_checkpoint(folder)
        defaults = family_named(found.family).defaults(found)
        scale = defaults.get("default_guidance_scale")
        assert (defaults.get("default_num_inference_steps"), scale == 0.0) == ((4, True) if few else (None, False))
    assert ("taken for a model of few steps" in caplog.text) == few
    assert ("may be a model of few steps" in caplog.text) == (kind == "Lightning")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: give a whole number"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps is 2\.5"),
        ({"guidance_scale": -1.0}, r"guidance_scale is -1\.0: give a number from 0 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_what_can_be_no_default(folders: list[Path], tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        export_checkpoint(folders[0], tmp_path / "bundle", **asked)


@pytest.mark.slow
def test_a_latent_consistency_model(tmp_path: Path) -> None:
    """The U-Net reads the scale, whose default is that of diffusers' pipeline; the number of steps is asked for."""
    folder = tiny.sd15(tmp_path / "lcm", "LatentConsistencyModelPipeline", time_cond_proj_dim=8)
    bundle = export_checkpoint(folder, tmp_path / "bundle", num_inference_steps=3)
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipe:
        manifest = pipe.bundle.manifest
        assert (manifest.default_num_inference_steps, manifest.default_guidance_scale) == (3, 8.5)
        reference = opened(diffusers.LatentConsistencyModelPipeline, folder)
        for request in ({}, {"guidance_scale": 1.5, "num_inference_steps": 3}):
            check(pipe, reference, **{"prompt": "a red circle", "num_inference_steps": 4, **request})
