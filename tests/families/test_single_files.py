"""Single files of original layouts against diffusers' own loader of them: Stable Diffusion XL and FLUX.1."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError, RequestError, UnsupportedModelError
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline
from latentrt.runtime.sampling import check_scheduler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.export.reference import reference_pipeline  # noqa: E402
from latentrt.export.single_files.flux import FLUX2  # noqa: E402
from latentrt.export.single_files.stable_diffusion_3 import SD3  # noqa: E402
from latentrt.export.single_files.z_image import Z_IMAGE  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ..export.loaded import loaded  # noqa: E402
from . import tiny, tiny_flux, tiny_transformers  # noqa: E402
from .compare import check, opened, picture  # noqa: E402
from .original_layouts import flux_tensors, original_tensors, sdxl_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {"base": "StableDiffusionXLPipeline", "refiner": "StableDiffusionXLImg2ImgPipeline"}
QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders whose heads are as wide as files have them."""
    folder = tmp_path_factory.mktemp("sdxl")
    return {kind: tiny.sdxl(folder / kind, refiner=kind == "refiner", original=True) for kind in KINDS}


def same(pipeline: Any, checkpoint: Any) -> None:
    for name in checkpoint.components:
        expected, found = getattr(pipeline, name).state_dict(), loaded(checkpoint, name).state_dict()
        assert expected.keys() == found.keys(), name
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_networks_and_configs_are_those_of_diffusers_loader(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    file = sdxl_file(folders[kind], tmp_path / "model.safetensors")
    theirs = getattr(diffusers, KINDS[kind]).from_single_file(
        str(file), config=str(folders[kind]), local_files_only=True, torch_dtype=torch.float32
    )
    checkpoint, whole = open_checkpoint(file, tokenizer=folders["base"]), open_checkpoint(folders[kind])
    family_named(checkpoint.family).check(checkpoint)
    same(theirs, checkpoint)
    assert checkpoint.pipeline == KINDS[kind] == whole.pipeline
    assert all(theirs.config.get(option, value) == value for option, value in checkpoint.options.items())
    for name, keys in CONFIGS.items():
        for key in keys if name in checkpoint.components else ():
            assert listed(checkpoint.config(name), key) == listed(whole.config(name), key), (name, key)
    theirs_scheduler = {key: value for key, value in theirs.scheduler.config.items() if key[0] != "_"}
    assert {key: checkpoint.scheduler.get(key, value) for key, value in theirs_scheduler.items()} == theirs_scheduler
    pads = {"tokenizer": None, "tokenizer_2": 0}
    assert {name: source.pad_id for name, source in checkpoint.tokenizers.items()} == {
        name: pads[name] for name in whole.tokenizers
    }


def listed(config: Any, key: str) -> Any:
    """Return a value of a config; a number for all levels stands for a list of it."""
    value, levels = config[key], len(config.get("block_out_channels", ()))
    if key in ("transformer_layers_per_block", "attention_head_dim"):
        return [value] * levels if isinstance(value, int) else list(value)
    return list(value) if isinstance(value, tuple) else value


CONFIGS = {
    "text_encoder": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    "text_encoder_2": ("hidden_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    "unet": (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
        "transformer_layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ),
    "vae": ("scaling_factor", "shift_factor", "latent_channels", "block_out_channels", "layers_per_block"),
}
"""What shapes tell, and what the same in all files is, as in the folder that the file was made of."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_diffusers_loader(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    file = sdxl_file(folders[kind], tmp_path / "model.safetensors")
    reference = opened(
        getattr(diffusers, KINDS[kind]),
        file,
        config=str(folders[kind]),
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    request = {**QUICK, "negative_prompt": "blue"}
    if kind == "refiner":
        request = {**request, "image": picture(32, 32), "strength": 1.0}
        del request["height"], request["width"]
    bundle = export_checkpoint(file, tmp_path / "bundle", tokenizer=folders["base"])
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipe:
        check(pipe, reference, **request)


def test_what_a_file_says_of_its_training(folders: dict[str, Path], tmp_path: Path) -> None:
    mark = torch.zeros(())
    file = sdxl_file(folders["base"], tmp_path / "v.safetensors", v_pred=mark, ztsnr=torch.zeros(()))
    scheduler = open_checkpoint(file, tokenizer=folders["base"]).scheduler
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == ("v_prediction", "trailing")
    assert float(diffusers.EulerDiscreteScheduler.from_config(scheduler).alphas_cumprod[-1]) < 1e-6
    asked = open_checkpoint(file, tokenizer=folders["base"], prediction_type="epsilon").scheduler
    assert (asked["prediction_type"], asked["timestep_spacing"]) == ("epsilon", "leading")


def test_a_file_of_playground(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' older loader reads the same scale, mean and deviation of latents off the file."""
    mean, deviation = torch.tensor([-1.5, 0.25, 2.0, 1.0]), torch.tensor([8.0, 5.5, 9.0, 5.0])
    edm = {"edm_mean": mean.view(1, 4, 1, 1), "edm_std": deviation.view(1, 4, 1, 1)}
    file = sdxl_file(folders["base"], tmp_path / "playground.safetensors", **edm)
    ddconfig = {"ch": 32, "ch_mult": [1, 2], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 1}
    original = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": ddconfig}}}}}
    wanted = single_file_utils.create_vae_diffusers_config_from_ldm(original, load_file(file), image_size=64)
    checkpoint = open_checkpoint(file, tokenizer=folders["base"])
    config = checkpoint.config("vae")
    assert config["scaling_factor"] == wanted["scaling_factor"] == 0.5
    assert (config["latents_mean"], config["latents_std"]) == (mean.tolist(), deviation.tolist())
    theirs = single_file_utils._legacy_load_scheduler(
        diffusers.EDMDPMSolverMultistepScheduler,
        load_file(file),
        "scheduler",
        scheduler_type="edm_dpm_solver_multistep",
    )
    assert checkpoint.scheduler["_class_name"] == type(theirs).__name__
    assert all(theirs.config[key] == value for key, value in checkpoint.scheduler.items() if key[0] != "_")
    asked = open_checkpoint(file, tokenizer=folders["base"], prediction_type="v_prediction").scheduler
    assert asked == {**checkpoint.scheduler, "prediction_type": "v_prediction"}
    check_scheduler(asked, None, (1024, 1024))
    assert type(theirs).from_config(asked).config.prediction_type == "v_prediction"


SECOND = "conditioner.embedders.1.model.text_projection"
LABELS = "model.diffusion_model.label_emb.0.0.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edm_vpred.sigma_max": torch.tensor(120.0)}, UnsupportedModelError, r"has edm_vpred\.sigma_max: .* CosXL"),
        ({SECOND: None}, CheckpointError, f"has no tensor '{SECOND}'"),
        ({SECOND: torch.zeros(32)}, CheckpointError, "other names or shapes than Stable Diffusion"),
        ({LABELS: torch.zeros(32)}, CheckpointError, "other names or shapes than Stable Diffusion"),
        ({LABELS: torch.zeros(32, 5)}, CheckpointError, "other names or shapes than Stable Diffusion"),
    ],
    ids=["CosXL", "no projection", "flat projection", "flat labels", "narrow labels"],
)
def test_files_of_the_xl_layout_that_are_not_are_refused_in_a_line(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = sdxl_file(folders["base"], tmp_path / "model.safetensors")
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    for prediction_type in (None, "v_prediction"):
        with pytest.raises(error, match=message) as caught:
            open_checkpoint(file, tokenizer=folders["base"], prediction_type=prediction_type)
        assert "\n" not in str(caught.value)


def test_a_vae_in_a_file_has_the_scale_of_the_family(folders: dict[str, Path], tmp_path: Path) -> None:
    """No tensor tells it; diffusers itself takes that of the first version unless it is given a config."""
    own = {f"vae.{k}": v for k, v in load_file(folders["base"] / "vae" / "diffusion_pytorch_model.safetensors").items()}
    save_file({name.removeprefix("vae."): tensor for name, tensor in own.items()}, tmp_path / "vae.safetensors")
    for source, options in (
        (folders["base"], {}),
        (sdxl_file(folders["base"], tmp_path / "model.safetensors"), {"tokenizer": folders["base"]}),
    ):
        checkpoint = open_checkpoint(source, vae=tmp_path / "vae.safetensors", **options)
        assert checkpoint.config("vae")["scaling_factor"] == 0.13025
        assert reference_pipeline(checkpoint, KINDS["base"], {}).vae.config.scaling_factor == 0.13025


def test_a_vae_in_a_file_has_the_scale_of_the_one_in_whose_place_it_is(tmp_path: Path) -> None:
    """Playground's U-Net draws latents that have a mean and a deviation, whatever VAE decodes them."""
    said: dict[str, Any] = {"scaling_factor": 0.5}
    said |= {"latents_mean": [-1.6, 1.1, 3.3, -2.6], "latents_std": [8.4, 5.9, 6.7, 5.2]}
    folder = tiny.sdxl(tmp_path / "playground", original=True, latents=said)
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(stored, tmp_path / "vae.safetensors")
    edm = {name: torch.tensor(said[f"latents_{name[4:]}"]).view(1, 4, 1, 1) for name in ("edm_mean", "edm_std")}
    file = sdxl_file(folder, tmp_path / "playground.safetensors", **edm)
    for source, options in ((folder, {}), (file, {"tokenizer": folder})):
        checkpoint = open_checkpoint(source, vae=tmp_path / "vae.safetensors", **options)
        theirs = reference_pipeline(checkpoint, KINDS["base"], {}).vae.config
        for key, value in said.items():
            assert checkpoint.config("vae")[key] == theirs[key] == pytest.approx(value), key


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.flux(tmp_path_factory.mktemp("flux") / "dev")


def converted(tensors: dict[str, Any]) -> Any:
    """Return what diffusers' own conversion makes of a file; the tiny width is in place of the one that it knows."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    names: dict[str, Any] = {}
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), vars(single_file_utils), names)
    return names["convert_flux_transformer_checkpoint_to_diffusers"](dict(tensors))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_alone_is_read_as_diffusers_reads_it(dev: Path, tmp_path: Path, prefix: str) -> None:
    tensors = flux_tensors(prefix)
    save_file(tensors, tmp_path / "flux1-dev.safetensors")
    checkpoint = open_checkpoint(tmp_path / "flux1-dev.safetensors", base=dev)
    family_named(checkpoint.family).check(checkpoint)
    wanted, found = converted(tensors), loaded(checkpoint, "transformer").state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    known = open_checkpoint(dev).config("transformer")
    differ = {key for key in known if checkpoint.config("transformer")[key] != known[key] and key[0] != "_"}
    assert differ <= {"out_channels"}  # None there, which means as many as go in
    assert sorted(checkpoint.files)[2:3] == ["transformer/flux1-dev.safetensors"]
    assert checkpoint.replaced["transformer"].name == "flux1-dev.safetensors"


@pytest.mark.slow
def test_pictures_of_a_transformer_alone(dev: Path, tmp_path: Path) -> None:
    """Shards of the base's own transformer need not be there."""
    tensors = flux_tensors("")
    save_file(tensors, tmp_path / "flux1-dev.safetensors")
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(dev / "transformer")
    theirs.load_state_dict(converted(tensors))
    reference = opened(diffusers.FluxPipeline, dev, transformer=theirs)
    bare = shutil.copytree(dev, tmp_path / "bare")
    (bare / "transformer" / "diffusion_pytorch_model.safetensors").unlink()

    def draw(**request: Any) -> Any:
        result = reference(**request)
        if request["output_type"] == "latent":
            result.images = reference._unpack_latents(result.images, 32, 32, reference.vae_scale_factor)
        return result

    bundle = export_checkpoint(tmp_path / "flux1-dev.safetensors", tmp_path / "bundle", base=bare)
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipe:
        assert pipe.bundle.manifest.source["replaced"] == {
            "transformer": {"name": "flux1-dev.safetensors", "revision": None}
        }
        check(pipe, draw, **QUICK)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (flux_tensors(""), {}, CheckpointError, "nothing but the transformer of FLUX.1: give the rest with --base"),
        (
            {name: each for name, each in flux_tensors("").items() if "vector_in" not in name},
            {"base": "dev"},
            UnsupportedModelError,
            r"blocks as FLUX\.1 has them and no vector_in.* such as Chroma",
        ),
        (
            flux_tensors("") | {"txt_in.weight": torch.zeros(32)},
            {"base": "dev"},
            CheckpointError,
            r"other names or shapes than FLUX\.1",
        ),
        (
            flux_tensors("", guided=False),
            {"base": "dev"},
            CheckpointError,
            "has not an embedded guidance scale and the",
        ),
        ({"a": torch.zeros(1)}, {"base": "dev"}, UnsupportedModelError, "has no transformer of FLUX.1, the family of"),
        (flux_tensors(""), {"base": "/nowhere"}, CheckpointError, "base /nowhere does not exist"),
        (flux_tensors(""), {"base": "dev", "tokenizer": "dev"}, RequestError, "are what base has"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_a_line(
    dev: Path, tmp_path: Path, tensors: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    given = {name: dev if value == "dev" else value for name, value in options.items()}
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(tmp_path / "model.safetensors", **given)
    assert "\n" not in str(caught.value)


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "sd3": (tiny_transformers.sd3, SD3, "sd3"),
    "sd3.5": (tiny_transformers.sd35, SD3, "sd3"),
    "klein": (tiny_flux.klein, FLUX2, "flux2"),
    "flux2-dev": (tiny_flux.flux2_dev, FLUX2, "flux2"),
    "z-image": (tiny_transformers.z_image, Z_IMAGE, "z_image"),
}
"""What writes a tiny checkpoint, its layout, and the name of diffusers' own conversion."""


@pytest.mark.parametrize("kind", OTHERS)
def test_transformers_of_other_families_are_read_as_diffusers_reads_them(tmp_path: Path, kind: str) -> None:
    write, layout, conversion = OTHERS[kind]
    base = write(tmp_path / "base")
    (stored,) = (base / "transformer").glob("*.safetensors")
    state = {
        name: torch.randn_like(each) if name != "pos_embed.pos_embed" else each
        for name, each in load_file(stored).items()
    }
    tensors = original_tensors(layout, state, open_checkpoint(base).config("transformer"))
    tensors |= {"norm_final.weight": torch.ones(32)} if kind == "z-image" else {}  # diffusers lets it go
    convert = getattr(single_file_utils, f"convert_{conversion}_transformer_checkpoint_to_diffusers")
    wanted = convert(dict(tensors))
    assert wanted.keys() == state.keys() and all(torch.equal(wanted[key], state[key]) for key in state)
    known = open_checkpoint(base).config("transformer")
    stored.unlink()
    for prefix in ("", "model.diffusion_model."):
        file = tmp_path / f"{prefix}model.safetensors"
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
        checkpoint = open_checkpoint(file, base=base)
        family_named(checkpoint.family).check(checkpoint)
        found = loaded(checkpoint, "transformer").state_dict()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted.keys() & found.keys())
        assert wanted.keys() - found.keys() <= {"pos_embed.pos_embed"}  # a table of sines, which is made anew
        config = checkpoint.config("transformer")
        differ = {key for key in known if listed(config, key) != listed(known, key) and key[0] != "_"}
        assert differ <= {"out_channels"}
        with pytest.raises(
            CheckpointError, match=rf"nothing but the transformer of {re.escape(family_named(checkpoint.family).title)}"
        ):
            open_checkpoint(file)


def test_a_file_of_another_family_than_its_base_is_refused(dev: Path, tmp_path: Path) -> None:
    klein = tiny_flux.klein(tmp_path / "klein")
    state = load_file(klein / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(original_tensors(FLUX2, state, {}), tmp_path / "klein.safetensors")
    guided = tiny_flux.flux2_dev(tmp_path / "dev")
    for base, error, message in (
        (dev, UnsupportedModelError, r"has no transformer of FLUX\.1, the family of"),
        (guided, CheckpointError, "has not an embedded guidance scale and the transformer of --base has"),
    ):
        with pytest.raises(error, match=message):
            open_checkpoint(tmp_path / "klein.safetensors", base=base)


def test_a_transformer_for_filling_is_refused(dev: Path, tmp_path: Path) -> None:
    save_file(flux_tensors("", channels=384), tmp_path / "fill.safetensors")
    checkpoint = open_checkpoint(tmp_path / "fill.safetensors", base=dev)
    with pytest.raises(UnsupportedModelError, match="takes 384 and gives 64 channels"):
        family_named(checkpoint.family).check(checkpoint)


def test_files_of_other_networks_of_the_same_layout(dev: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    more = {"model.diffusion_model.fuser.0.weight": torch.zeros(4)}
    xl, flux = sdxl_file(folders["base"], tmp_path / "xl.safetensors", **more), tmp_path / "flux.safetensors"
    save_file(flux_tensors("model.diffusion_model.") | more, flux)
    save_file(flux_tensors("") | {"vae.a": torch.zeros(1)}, beside := tmp_path / "beside.safetensors")
    open_checkpoint(beside, base=dev).load("transformer")
    for checkpoint, name in (
        (open_checkpoint(xl, tokenizer=folders["base"]), "unet"),
        (open_checkpoint(flux, base=dev), "transformer"),
    ):
        with pytest.raises(UnsupportedModelError, match=r"has a tensor '.*fuser\.0\.weight', which an ordinary"):
            checkpoint.load(name)
        checkpoint.components[name].shallow().load()


def test_a_base_is_for_single_files(dev: Path) -> None:
    with pytest.raises(RequestError, match="base is for a single"):
        open_checkpoint(dev, base=dev)
