"""The reference of `verify` is diffusers' own reading of a checkpoint, whatever ours makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.engines.files import sha256_of
from latentrt.runtime.cli import run

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("diffusers")

from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.exporter import _provenance  # noqa: E402
from latentrt.export.reference import opened_by, reference_pipeline  # noqa: E402
from latentrt.export.single_files import stable_diffusion  # noqa: E402
from latentrt.export.verify import check_source  # noqa: E402

from .loaded import loaded  # noqa: E402
from .original_files import original_tensors, with_text_layers  # noqa: E402

PIPELINE = "StableDiffusionPipeline"


@pytest.mark.filterwarnings("ignore")
def test_the_reference_does_not_share_a_mistake_of_ours(
    tiny_sd21_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = with_text_layers(tiny_sd21_checkpoint, tmp_path / "deep", 23)
    file = tmp_path / "model.safetensors"
    safetensors.save_file(original_tensors(deep, 2), file)
    monkeypatch.setattr(stable_diffusion, "OPEN_CLIP_LAYERS", 22)  # one that is used is dropped
    opened = open_checkpoint(file, tokenizer=deep, prediction_type="epsilon")
    theirs = reference_pipeline(opened, PIPELINE)
    assert opened.config("text_encoder")["num_hidden_layers"] == 22
    ids, right = torch.arange(77)[None], loaded(open_checkpoint(deep), "text_encoder")
    with torch.no_grad():
        expected = right(ids).last_hidden_state
        assert torch.equal(theirs.text_encoder(ids).last_hidden_state, expected)
        assert not torch.allclose(loaded(opened, "text_encoder")(ids).last_hidden_state, expected, atol=1e-2)
    assert theirs.scheduler.config.prediction_type == "epsilon"
    assert theirs.tokenizer.pad_token_id == 0


@pytest.mark.filterwarnings("ignore")
def test_graphs_take_copies_of_the_reference_apart(tiny_sd15_checkpoint: Path, tiny_sd21_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_sd15_checkpoint, vae=tiny_sd21_checkpoint)
    pipeline = reference_pipeline(opened, PIPELINE)
    expected = safetensors.load_file(tiny_sd21_checkpoint / "vae/diffusion_pytorch_model.safetensors")
    stored = pipeline.vae.state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    copied = loaded(opened_by(pipeline, opened), "vae")
    copied.encoder = None
    assert pipeline.vae.encoder is not None
    assert copied.decoder.conv_in.weight is pipeline.vae.decoder.conv_in.weight


@pytest.mark.filterwarnings("ignore")
def test_a_single_file_verifies(
    tiny_sd15_bundle: Path, tiny_sd15_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle of a folder against the same weights in a file that has no VAE, with the folder's."""
    tensors = original_tensors(tiny_sd15_checkpoint, 1)
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    file = tmp_path / "model.safetensors"
    safetensors.save_file(bare, file)
    arguments = ["verify", str(tiny_sd15_bundle), "--against", str(file), "--tokenizer", str(tiny_sd15_checkpoint)]
    arguments += ["--steps", "2", "--threads", "1", "--any-checkpoint"]
    assert run(arguments) == 1
    assert "has no VAE" in capsys.readouterr().err
    assert run([*arguments, "--vae", str(tiny_sd15_checkpoint)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "within the bounds"


def test_a_bundle_says_whose_vae_it_has(tiny_sd15_checkpoint: Path, tiny_sd21_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_sd15_checkpoint, vae=tiny_sd21_checkpoint / "vae")
    source: dict[str, Any] = _provenance(opened, ())
    weights = tiny_sd21_checkpoint / "vae/diffusion_pytorch_model.safetensors"
    assert source["replaced"] == {"vae": {"name": "vae", "revision": None}}
    assert source["files"]["vae/diffusion_pytorch_model.safetensors"] == sha256_of(weights)
    bundle: Any = SimpleNamespace(path="bundle", manifest=SimpleNamespace(source=source))
    check_source(bundle, opened)
    with pytest.raises(BundleError, match="with vae 'vae' in place of the checkpoint's own: give it with --vae"):
        check_source(bundle, open_checkpoint(tiny_sd15_checkpoint))
    with pytest.raises(BundleError, match=r"vae/diffusion_pytorch_model\.safetensors of .* none of its files"):
        check_source(bundle, open_checkpoint(tiny_sd15_checkpoint, vae=tiny_sd15_checkpoint))


def test_what_diffusers_cannot_open_is_one_line(tiny_sd15_checkpoint: Path) -> None:
    opened = open_checkpoint(tiny_sd15_checkpoint)
    with pytest.raises(
        CheckpointError, match="diffusers cannot open tiny-sd15, so there is nothing to compare"
    ) as found:
        reference_pipeline(opened, "NoSuchPipeline")
    assert "\n" not in str(found.value)
