"""Scheduler configs that people have published: each is its pipeline's, or is refused at export by name.

`published_schedulers.json` has their sources: files of model repositories, and configs that diffusers' conversion
scripts, tests and documents write down. The reference is diffusers' own scheduler, as the pipeline opens and drives it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

diffusers = pytest.importorskip("diffusers")

from latentrt.engines.bundle import ScheduleRule  # noqa: E402
from latentrt.engines.errors import RequestError, UnsupportedModelError  # noqa: E402
from latentrt.export.checkpoints import diffusers_folder  # noqa: E402
from latentrt.export.checkpoints.checkpoint import Checkpoint  # noqa: E402
from latentrt.export.families import family_of_pipeline  # noqa: E402
from latentrt.export.shift import shift_line  # noqa: E402
from latentrt.runtime.sampling import check_scheduler, step_table  # noqa: E402

from ..runtime.conftest import Schedulers, denoiser, with_variance  # noqa: E402

FILE = Path(__file__).with_name("published_schedulers.json")
PUBLISHED: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
SAMPLE = sorted(PUBLISHED)[::8]
STEPS = (1, 4, 20, 50)
SIZE = (1024, 1024)

BROWNIAN = "its noise is a Brownian tree, drawn by torchsde; the nearest sampler is dpmpp_2m_sde"
REFUSED = {
    "stable-audio": BROWNIAN,
    "stable-audio-2": BROWNIAN,
    "stable-audio-4": BROWNIAN,
    "helios": "it changes the size of the latents between its steps",
    "dpm-multi-inverse": "it runs from pictures to noise; the nearest sampler is ddim_inverse",
    "minimax-h3": "sampler 'MiniMaxH3Scheduler' is not known: near are",
    "minimax-h3-audio": "sampler 'MiniMaxH3Scheduler' is not known: near are",
}
# numbers of steps that diffusers itself fails at, or that end in no number
IMPOSSIBLE = {
    **dict.fromkeys(("karlo-prior", *(f"kakao-brain-unclip{end}" for end in ("", "-2", "-3")), "kandinsky-2"), (1,)),
    **dict.fromkeys(("ltx-video", "ltx-of-0.32", "qwen-image"), (1,)),  # the one step is stretched over a length of 0
    **dict.fromkeys(("consistency", "consistency-models"), (50,)),  # of 40 training steps
    "pipelines": (20, 50),  # of 10
    **dict.fromkeys(("pndm-silent", "sd-onnx-short", "pixart-learned-pndm"), (1,)),  # Runge-Kutta takes more
}
VAE = {"block_out_channels": [1, 1, 1, 1], "latent_channels": 16}
TRANSFORMER = {"in_channels": 16, "patch_size": 2, "sample_size": 128}
# pipelines without an exporter: their module, and what they hand over
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ChromaPipeline": ("chroma.pipeline_chroma", {"sigmas": "even"}),
    "Lumina2Pipeline": ("lumina2.pipeline_lumina2", {"sigmas": "even", "tokens": 16}),
    "QwenImagePipeline": ("qwenimage.pipeline_qwenimage", {"sigmas": "even"}),
    "LTXPipeline": ("ltx.pipeline_ltx", {"sigmas": "even", "pixels_per_token": 32}),
    "CogView4Pipeline": ("cogview4.pipeline_cogview4", {"sigmas": "whole", "power": 0.5}),
}
WITH_EXPORTER = {
    "FluxPipeline": ("flux.pipeline_flux", {"sigmas": "even"}),
    "Flux2KleinPipeline": ("flux2.pipeline_flux2_klein", {"sigmas": "even"}),
    "ZImagePipeline": ("z_image.pipeline_z_image", {"sigmas": "even"}),
    "StableDiffusion3Pipeline": ("stable_diffusion_3.pipeline_stable_diffusion_3", {}),
}


class Opener:
    """Opens a config as the export does, and as diffusers' pipeline does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.networks = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}

    def write(self, pipeline: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Write a config into the folder, as a checkpoint of a pipeline, and return the index."""
        (self.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((self.folder / "model_index.json").read_text())
        index |= {
            "_class_name": pipeline,
            "_diffusers_version": "0.42.1",
            "scheduler": ["diffusers", config["_class_name"]],
        }
        (self.folder / "model_index.json").write_text(json.dumps(index))
        return dict(index)

    def ours(self, pipeline: str | None, config: Mapping[str, Any]) -> tuple[dict[str, Any], ScheduleRule | None]:
        """Return the scheduler config and the rule of the manifest."""
        index = self.write(pipeline or "StableDiffusionPipeline", config)
        read = diffusers_folder._scheduler(self.folder, index)
        family = family_of_pipeline(pipeline) if pipeline else None
        if family is None:
            return read, other_rule(str(pipeline), config) if pipeline else None
        parts: Any = {"vae": SimpleNamespace(config=VAE), "transformer": SimpleNamespace(config=TRANSFORMER)}
        checkpoint = Checkpoint("tiny", family.name, str(pipeline), parts, {}, read, {}, self.folder)
        return family.scheduler(checkpoint), family.schedule(checkpoint)

    def theirs(self, pipeline: str | None, config: Mapping[str, Any]) -> Any:
        """Return diffusers' scheduler."""
        if pipeline is None or pipeline in OTHERS | WITH_EXPORTER:  # whose constructors leave a scheduler as it is
            return getattr(diffusers, config["_class_name"]).from_config(dict(config))
        self.write(pipeline, config)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return getattr(diffusers, pipeline).from_pretrained(self.folder, **none, **self.networks).scheduler


def other_rule(pipeline: str, config: Mapping[str, Any]) -> ScheduleRule:
    """Return the rule that a family of a pipeline without one would write."""
    given = OTHERS[pipeline][1]
    line = shift_line(config)
    if pipeline == "CogView4Pipeline":  # its shift is base + slope * sqrt(tokens / base tokens)
        slope = config["max_shift"] / config["base_image_seq_len"] ** 0.5
        line = line.model_copy(update={"slope": slope, "offset": config["base_shift"]})
    return ScheduleRule(lines=(line,), **given)


def driven(pipeline: str | None, scheduler: Any, steps: int) -> dict[str, Any]:
    """Return what the pipeline passes to `set_timesteps`, by the pipeline's own functions."""
    if pipeline is None or pipeline not in OTHERS | WITH_EXPORTER:
        return {}
    where, given = (OTHERS | WITH_EXPORTER)[pipeline]
    module, config = import_module(f"diffusers.pipelines.{where}"), scheduler.config
    side = given.get("pixels_per_token", 16)
    tokens = given.get("tokens", (SIZE[0] // side) * (SIZE[1] // side))
    if pipeline == "Flux2KleinPipeline":
        mu = module.compute_empirical_mu(tokens, steps)
    elif pipeline == "CogView4Pipeline":
        mu = module.calculate_shift(tokens, *(config[key] for key in ("base_image_seq_len", "base_shift", "max_shift")))
    else:
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = module.calculate_shift(tokens, *(config[key] for key in keys))
    handed: dict[str, Any] = {"mu": mu} if config.use_dynamic_shifting else {}
    if given.get("sigmas") == "even":
        handed["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    elif given.get("sigmas") == "whole":
        timesteps = np.linspace(config.num_train_timesteps, 1.0, steps).astype(np.int64).astype(np.float32)
        handed |= {"timesteps": timesteps, "sigmas": timesteps / config.num_train_timesteps}
    return handed


@pytest.fixture(scope="module")
def schedulers() -> Schedulers:
    return Schedulers()


@pytest.fixture(scope="module")
def opener(tiny_sd15_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    yield Opener(shutil.copytree(tiny_sd15_checkpoint, tmp_path_factory.mktemp("published") / "checkpoint"))


def assert_equal_or_refused(name: str, opener: Opener, schedulers: Schedulers) -> bool:
    """Compare one config and return True, or False when it is one of those that are refused as they should be."""
    pipeline, config = PUBLISHED[name].get("pipeline"), PUBLISHED[name]["config"]
    read, rule = opener.ours(pipeline, config)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError) as caught:
            check_scheduler(read, rule, SIZE)
        said = str(caught.value)
        assert REFUSED[name] in said and config["_class_name"] in said and said.isprintable()
        return False
    if max(STEPS) not in IMPOSSIBLE.get(name, ()):
        check_scheduler(read, rule, SIZE)
    reads = not config["_class_name"].startswith("PNDM")  # which names variances, and knows none
    network = with_variance if config.get("variance_type") == "learned_range" and reads else denoiser
    for steps in STEPS:
        if steps in IMPOSSIBLE.get(name, ()):
            continue
        scheduler = opener.theirs(pipeline, config)
        wanted = schedulers.run(
            config, steps, scheduler=scheduler, network=network, **driven(pipeline, scheduler, steps)
        )
        assert np.isfinite(wanted).all(), name
        got = schedulers.run_table(read, steps, network=network, rule=rule, size=SIZE)
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-5, f"{name}, {steps} steps: {error:.1e}"
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_published_configs(name: str, opener: Opener, schedulers: Schedulers) -> None:
    assert_equal_or_refused(name, opener, schedulers)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_published_config_is_its_pipelines_or_is_refused(opener: Opener, schedulers: Schedulers) -> None:
    failed, equal = [], 0
    for name in PUBLISHED:
        try:
            equal += assert_equal_or_refused(name, opener, schedulers)
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
    assert equal == len(PUBLISHED) - len(REFUSED)


@pytest.mark.parametrize("name", ["karlo-prior", "ltx-video"])
def test_a_number_of_steps_that_cannot_be_is_named(name: str, opener: Opener) -> None:
    read, rule = opener.ours(PUBLISHED[name].get("pipeline"), PUBLISHED[name]["config"])
    with pytest.raises(RequestError, match="take"):
        step_table(read, 1, rule=rule, size=SIZE)
