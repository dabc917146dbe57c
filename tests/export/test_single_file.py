"""Single files of the original layout, read as diffusers' own loader reads them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, UnsupportedModelError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402

from .loaded import loaded  # noqa: E402
from .original_files import original_tensors, original_vae, with_text_layers  # noqa: E402

LAYOUTS = {"1.x": (1, 2, 0), "2.x of diffusers": (2, 23, 0), "2.x of OpenCLIP": (2, 23, 1)}
"""Version, text layers, and text layers that are not used."""


@pytest.fixture(scope="module")
def folders(
    tiny_sd15_checkpoint: Path, tiny_sd21_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Diffusers folders of both versions; the second has as many text layers as the true one."""
    deep = with_text_layers(tiny_sd21_checkpoint, tmp_path_factory.mktemp("deep") / "tiny-sd21", 23)
    return {1: tiny_sd15_checkpoint, 2: deep}


@pytest.fixture(scope="module")
def tensors(folders: dict[int, Path]) -> dict[str, dict[str, Any]]:
    return {
        layout: original_tensors(folders[version], version, spare) for layout, (version, _, spare) in LAYOUTS.items()
    }


def write(folder: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    safetensors.save_file(tensors, folder / "model.safetensors", metadata or None)
    return folder / "model.safetensors"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_are_those_of_diffusers_loader(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    version, layers, _ = LAYOUTS[layout]
    source, file = folders[version], write(tmp_path, tensors[layout])
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(source), local_files_only=True, torch_dtype=torch.float32
    )
    opened = open_checkpoint(file, tokenizer=source)
    family_named(opened.family).check(opened)
    assert (opened.name, opened.tokenizers["tokenizer"].folder) == ("model.safetensors", source / "tokenizer")
    assert opened.config("text_encoder")["num_hidden_layers"] == layers
    for name in ("unet", "vae", "text_encoder"):
        expected, found = getattr(theirs, name).state_dict(), loaded(opened, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    ids = torch.randint(0, 400, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.text_encoder.eval()(ids).last_hidden_state
        assert torch.equal(loaded(opened, "text_encoder")(ids).last_hidden_state, expected)


@pytest.mark.parametrize("version", [1, 2])
def test_names_are_what_diffusers_takes_for_the_original(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], version: int
) -> None:
    """diffusers' own conversion, an independent inverse, gives back the U-Net and the autoencoder."""
    checkpoint = open_checkpoint(folders[version])
    old = tensors[next(layout for layout in LAYOUTS if LAYOUTS[layout][0] == version)]
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(old), dict(checkpoint.config("unet")))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(old), dict(checkpoint.config("vae")))
    for converted, module in ((unet, loaded(checkpoint, "unet")), (vae, loaded(checkpoint, "vae"))):
        expected = module.state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_fewer_text_layers_than_the_second_version_has_are_refused(tiny_sd21_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, original_tensors(tiny_sd21_checkpoint, 2))
    with pytest.raises(UnsupportedModelError, match=r"has 2 text layers where Stable Diffusion 2\.x has 23"):
        open_checkpoint(file, tokenizer=tiny_sd21_checkpoint)


MARK = torch.zeros(())
BASE = torch.tensor(875000)
SAYS: dict[str, tuple[str, dict[str, Any], dict[str, str], str, bool]] = {
    "1.x without a word": ("1.x", {}, {}, "epsilon", False),
    "2.x without a word": ("2.x of diffusers", {}, {}, "v_prediction", False),
    "1.x, modelspec v": ("1.x", {}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
    "2.x, modelspec epsilon": ("2.x of diffusers", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    "2.x at 512": ("2.x of diffusers", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    "2.x at 768": (
        "2.x of diffusers",
        {},
        {"modelspec.architecture": "stable-diffusion-v2-768-v"},
        "v_prediction",
        False,
    ),
    "1.x by name": ("1.x", {}, {"modelspec.architecture": "stable-diffusion-v1"}, "epsilon", False),
    "1.x, v_pred": ("1.x", {"v_pred": MARK}, {}, "v_prediction", False),
    "1.x, v_pred and ztsnr": ("1.x", {"v_pred": MARK, "ztsnr": torch.zeros(())}, {}, "v_prediction", True),
    "1.x, ztsnr": ("1.x", {"ztsnr": MARK}, {}, "v_prediction", True),
    "2.x, ztsnr": ("2.x of diffusers", {"ztsnr": MARK}, {}, "v_prediction", True),
    "2.x base": ("2.x of diffusers", {"global_step": BASE}, {}, "epsilon", False),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_a_file_says_about_its_training(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path, case: str
) -> None:
    layout, marks, metadata, prediction, zero_snr = SAYS[case]
    version = LAYOUTS[layout][0]
    file = write(tmp_path, tensors[layout] | marks, **metadata)
    opened = open_checkpoint(file, tokenizer=folders[version])
    scheduler = dict(opened.scheduler)
    assert scheduler["prediction_type"] == prediction
    assert scheduler["_class_name"] == ("PNDMScheduler" if version == 1 and not zero_snr else "DDIMScheduler")
    assert opened.config("unet")["sample_size"] == (96 if version == 2 and prediction == "v_prediction" else 64)
    last = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    assert (float(last.alphas_cumprod[-1]) < 1e-12) is zero_snr
    last.set_timesteps(10)
    assert (int(last.timesteps[0]) == 999) is zero_snr


def test_the_prediction_type_that_is_asked_for_wins(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    marked = tensors["1.x"] | {"v_pred": MARK, "ztsnr": torch.zeros(())}
    file = write(tmp_path, marked, **{"modelspec.prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match=r"predicts two things \(epsilon by modelspec.*v_prediction by"):
        open_checkpoint(file, tokenizer=folders[1])
    asked = open_checkpoint(file, tokenizer=folders[1], prediction_type="epsilon").scheduler
    assert (asked["prediction_type"], asked.get("rescale_betas_zero_snr")) == ("epsilon", None)
    asked = open_checkpoint(file, tokenizer=folders[1], prediction_type="v_prediction").scheduler
    assert (asked["prediction_type"], asked["rescale_betas_zero_snr"]) == ("v_prediction", True)
    file = write(tmp_path, tensors["1.x"], **{"modelspec.prediction_type": "noise"})
    with pytest.raises(CheckpointError, match=r"modelspec\.prediction_type 'noise', where epsilon"):
        open_checkpoint(file, tokenizer=folders[1])


def test_a_guess_is_told(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = write(tmp_path, tensors["2.x of diffusers"])
    open_checkpoint(file, tokenizer=folders[2], prediction_type="v_prediction")
    assert not caplog.records
    open_checkpoint(file, tokenizer=folders[2])
    assert "does not say what it predicts" in caplog.text


def test_schedulers_are_those_of_the_published_folders(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for layout, version in (("1.x", 1), ("2.x of OpenCLIP", 2)):
        file = write(tmp_path, tensors[layout])
        opened = open_checkpoint(file, tokenizer=folders[version])
        assert dict(opened.scheduler) == dict(open_checkpoint(folders[version]).scheduler)
        assert opened.tokenizers["tokenizer"].pad_id == (None if version == 1 else 0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: not name.startswith("cond_stage_model."), "has no text encoder"),
        (lambda name: not name.startswith("model.diffusion_model."), "not in the original layout of"),
        (lambda name: not name.startswith("first_stage_model."), "has no VAE .*: give one with --vae"),
        (lambda name: "post_quant_conv" not in name, "has no tensor 'first_stage_model.post_quant_conv.weight'"),
    ],
)
def test_incomplete_single_files(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path, keep: Any, message: str
) -> None:
    file = write(tmp_path, {name: tensor for name, tensor in tensors["1.x"].items() if keep(name)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file, tokenizer=folders[1])


def test_text_names_that_diffusers_does_not_read_either(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    old = {name.replace("transformer.text_model.", "transformer."): each for name, each in tensors["1.x"].items()}
    assert not single_file_utils.is_clip_model(old)
    with pytest.raises(CheckpointError, match=r"names its text encoder cond_stage_model\.transformer\.\* where"):
        open_checkpoint(write(tmp_path, old), tokenizer=folders[1])


def test_shapes_of_another_layout(folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    file = write(tmp_path, tensors["1.x"] | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="of other names or shapes than Stable Diffusion"):
        open_checkpoint(file, tokenizer=folders[1])


def test_files_of_other_u_nets_of_the_same_layout(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    picture = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 4)}
    for layout, (version, _, _) in LAYOUTS.items():
        with pytest.raises(UnsupportedModelError, match=r"label_emb\.\*, which reads a picture, as Stable unCLIP does"):
            open_checkpoint(write(tmp_path, tensors[layout] | picture), tokenizer=folders[version])
    more = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(4, 4)}
    opened = open_checkpoint(write(tmp_path, tensors["1.x"] | more), tokenizer=folders[1])
    with pytest.raises(
        UnsupportedModelError, match=r"U-Net of .* has a tensor '.*cond_proj\.weight', which an ordinary"
    ):
        opened.load("unet")


def test_other_families_in_a_single_file(tmp_path: Path) -> None:
    file = write(tmp_path, {"conditioner.embedders.0.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="as Stable Diffusion XL has them"):
        open_checkpoint(file)


VAE_FILES = ["folder", "checkpoint", "original", "prefixed", "in a checkpoint", "diffusers"]


@pytest.mark.parametrize("kind", VAE_FILES)
def test_a_vae_in_place_of_the_checkpoint_s(
    folders: dict[int, Path], tensors: dict[str, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """Every way to give one, for a file that has none; diffusers' own reading of it is the reference."""
    folder, file = folders[2] / "vae", tmp_path / "vae.safetensors"
    old = original_vae(folder)
    if kind == "original":
        safetensors.save_file(old, file)
    elif kind == "prefixed":
        safetensors.save_file({f"first_stage_model.{name}": tensor for name, tensor in old.items()}, file)
    elif kind == "in a checkpoint":
        safetensors.save_file(tensors["2.x of diffusers"], file)
    elif kind == "diffusers":
        safetensors.save_file(safetensors.load_file(folder / "diffusion_pytorch_model.safetensors"), file)
    given = {"folder": folder, "checkpoint": folders[2]}.get(kind, file)
    bare = {name: tensor for name, tensor in tensors["1.x"].items() if not name.startswith("first_stage_model.")}
    opened = open_checkpoint(write(tmp_path, bare), tokenizer=folders[1], vae=given)
    family_named(opened.family).check(opened)
    theirs = (
        diffusers.AutoencoderKL.from_pretrained(str(folder))
        if given.is_dir()
        else diffusers.AutoencoderKL.from_single_file(str(given), config=str(folder), local_files_only=True)
    )
    expected, found = theirs.state_dict(), loaded(opened, "vae").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert opened.config("vae")["scaling_factor"] == theirs.config.scaling_factor
    name = file.name if given == file else "diffusion_pytorch_model.safetensors"
    assert sorted(opened.files) == ["model.safetensors", f"vae/{name}"]
    assert opened.replaced["vae"].name == given.name


def test_what_is_no_vae(folders: dict[int, Path], tmp_path: Path) -> None:
    def refused(given: Path | str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folders[1], vae=given)

    refused(tmp_path / "nothing", "does not exist")
    refused("vae.ckpt", "opening a pickle runs the code inside it")
    refused(write(tmp_path, {"a": torch.zeros(1)}), "holds no autoencoder")
    refused(folders[1] / "unet", r"'UNet2DConditionModel': give an AutoencoderKL")
    refused(tmp_path, r"vae/config\.json is missing")
