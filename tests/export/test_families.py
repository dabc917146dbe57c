"""A new family is one file of `export/families/`: it is found, exported and drawn with nothing else touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import UnsupportedModelError
from latentrt.runtime import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from latentrt.export import export_checkpoint, families  # noqa: E402
from safetensors.torch import save_model  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPT, STEPS, SEED, GUIDANCE = "a red circle", 4, 3, 5.0


@pytest.fixture
def toy_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the folder of families hold one more file."""
    here = str(Path(__file__).parent / "more_families")
    monkeypatch.setattr(families, "__path__", [*families.__path__, here])
    families.families.cache_clear()
    yield
    families.families.cache_clear()


@pytest.fixture
def toy_checkpoint(tiny_sd15_checkpoint: Path, tmp_path: Path, toy_family: None) -> Path:
    """Text encoder, VAE and tokenizer of a tiny checkpoint, with the toy's denoiser in place of the U-Net."""
    from latentrt.export.families import toy  # type: ignore[attr-defined]

    folder = tmp_path / "toy"
    shutil.copytree(tiny_sd15_checkpoint, folder)
    shutil.rmtree(folder / "unet")
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    (folder / "denoiser").mkdir()
    (folder / "denoiser" / "config.json").write_text(json.dumps({"channels": 4, "width": 8, "context_width": width}))
    save_model(toy.ToyDenoiser(4, 8, width), str(folder / "denoiser" / "model.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "ToyPipeline", "denoiser": ["toy", "ToyDenoiser"]}
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def reference(folder: Path, height: int, width: int) -> np.ndarray:  # type: ignore[type-arg]
    """Draw the picture with diffusers' scheduler and autoencoder in a plain loop."""
    from latentrt.export.families import toy  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    config = json.loads((folder / "denoiser" / "config.json").read_text())
    denoiser = toy.ToyDenoiser(**config)
    denoiser.load_state_dict(load_file(folder / "denoiser" / "model.safetensors"))
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    ids = tokenizer(["", PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        context = encoder(ids).last_hidden_state
        scheduler.set_timesteps(STEPS)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (1, 4, height // factor, width // factor)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) * scheduler.init_noise_sigma
        sizes = torch.tensor([[height, width]] * 2, dtype=torch.float32)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            unconditional, conditional = denoiser(scaled, t.expand(2), context, sizes).chunk(2)
            prediction = unconditional + GUIDANCE * (conditional - unconditional)
            latents = scheduler.step(prediction, t, latents).prev_sample
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_family_in_one_file_is_found_exported_and_drawn(toy_checkpoint: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(export_checkpoint(toy_checkpoint, tmp_path / "bundle"))
    assert bundle.manifest.family == "toy"
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
        for height, width in ((64, 64), (48, 72)):
            result = pipe(
                PROMPT, height=height, width=width, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED
            )
            expected = reference(toy_checkpoint, height, width)
            assert np.abs(np.asarray(result.images[0]) - expected).max() <= 2


def test_without_its_file_the_family_is_refused_by_name(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd15_checkpoint, tmp_path / "toy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    with pytest.raises(
        UnsupportedModelError, match=r"pipeline .ToyPipeline. is not supported, only .*StableDiffusionPipeline"
    ):
        export_checkpoint(folder, tmp_path / "bundle")


def test_every_family_is_described() -> None:
    found = families.families()
    names = [family.name for family in found]
    assert len(set(names)) == len(names) and {"stable-diffusion", "stable-diffusion-xl"} <= set(names)
    assert all(family.title and family.pipelines and family.parts for family in found)
    pipelines = [pipeline for family in found for pipeline in family.pipelines]
    assert len(set(pipelines)) == len(pipelines)
    assert all(hasattr(diffusers, pipeline) for pipeline in pipelines)


@pytest.mark.parametrize("layer", ["runtime", "engines"])
def test_no_family_is_named_below_the_export(layer: str) -> None:
    names = [name for family in families.families() for name in (family.name, family.title, *family.pipelines)]
    ordinary = {"stable-diffusion", "StableDiffusionPipeline"}  # in examples of hub ids and of calls
    for file in (ROOT / layer).rglob("*.py"):
        code = file.read_text(encoding="utf-8")
        found = [name for name in names if name not in ordinary and name in code]
        assert not found, f"{file} names {found}"
