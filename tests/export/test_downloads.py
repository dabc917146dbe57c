"""Checkpoints from a hub that stands in for the true one: what is fetched, and what is done about what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.errors import CheckpointError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("diffusers")

from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: E402
from huggingface_hub.utils import filter_repo_objects  # noqa: E402
from latentrt.export.checkpoints.hub import download  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.exporter import write_tokenizers  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402

from ..families import tiny, tiny_flux, tiny_transformers  # noqa: E402
from .test_weight_files import STEMS, add_variant, plain, shard  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Hub:
    """Repositories `org/<name>`, each a folder, and the cache for what was fetched of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.offline = False

    def repository(self, name: str) -> Path:
        return self.folder / "hub" / name

    def cached(self, name: str) -> Path:
        return self.folder / "cache" / name

    def download(self, repository: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        name = repository.removeprefix("org/")
        there, here = self.repository(name), self.cached(name)
        files = [file.relative_to(there).as_posix() for file in sorted(there.rglob("*")) if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            if (here / file).exists():
                continue
            if self.offline:
                raise LocalEntryNotFoundError(f"{file} is missing")
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(there / file, here / file)
            self.fetched.append(file)
        return str(here)


@pytest.fixture
def hub(tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that has the repository `org/model`."""
    found = Hub(tmp_path)
    shutil.copytree(tiny_sd15_checkpoint, found.repository("model"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: [])
    return found


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("part", STEMS)
def test_shards_that_an_interrupted_download_left_out_are_fetched(hub: Hub, part: str, variant: str | None) -> None:
    shard(hub.repository("model"), part, f".{variant}" if variant else "")
    if variant is None:
        plain(hub.repository("model"), part).unlink()
    before = open_checkpoint("org/model", variant=variant).files
    (missing,) = hub.cached("model").glob(f"{part}/*-00002-of-00002.safetensors")
    missing.unlink()
    hub.fetched.clear()
    assert open_checkpoint("org/model", variant=variant).files == before
    assert hub.fetched == [f"{part}/{missing.name}"]


def test_shards_of_a_vae_are_fetched_too(hub: Hub, tiny_sd15_checkpoint: Path) -> None:
    shutil.copytree(tiny_sd15_checkpoint / "vae", hub.repository("other") / "vae")
    shard(hub.repository("other"), "vae")
    plain(hub.repository("other"), "vae").unlink()
    before = open_checkpoint(tiny_sd15_checkpoint, vae="org/other").files
    (missing,) = hub.cached("other").glob("vae/*-00002-of-00002.safetensors")
    missing.unlink()
    assert open_checkpoint(tiny_sd15_checkpoint, vae="org/other").files == before


def test_shards_that_are_not_there_either_are_named(hub: Hub) -> None:
    shard(hub.repository("model"), "unet")
    plain(hub.repository("model"), "unet").unlink()
    next(hub.repository("model").glob("unet/*-00001-of-00002.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"-00001-of-00002\.safetensors is missing, which diffusion_pytorch"):
        open_checkpoint("org/model")


def weights(names: Sequence[str]) -> set[str]:
    return {name for name in names if name.endswith((".safetensors", ".bin"))}


def in_every_kind(folder: Path) -> set[str]:
    """Write a variant of each network, and the same as a pickle, which is not to be read; return the first."""
    found = set()
    for part, stem in STEMS.items():
        add_variant(folder, part, "fp16")
        found.add(f"{part}/{stem}.fp16.safetensors")
        pickle = "pytorch_model" if part == "text_encoder" else stem
        (folder / part / f"{pickle}.fp16.bin").write_bytes(b"a pickle")
    return found


@pytest.mark.parametrize("plain_before", [False, True])
def test_a_variant_is_fetched_in_one_format(hub: Hub, plain_before: bool) -> None:
    wanted = in_every_kind(hub.repository("model"))
    if plain_before:
        open_checkpoint("org/model")
        hub.fetched.clear()
    assert set(open_checkpoint("org/model", variant="fp16").files) == wanted
    assert weights(hub.fetched) == wanted
    hub.offline = True
    assert set(open_checkpoint("org/model", variant="fp16").files) == wanted


def test_of_networks_without_the_variant_the_plain_weights_are_fetched(hub: Hub) -> None:
    there = hub.repository("model")
    add_variant(there, "unet", "fp16")
    tensors = safetensors.load_file(plain(there, "text_encoder"))
    torch.save(tensors, there / "text_encoder" / "pytorch_model.fp16.bin")
    wanted = {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.fp16.bin",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert set(open_checkpoint("org/model", variant="fp16").files) == wanted
    assert weights(hub.fetched) == wanted


def test_a_vae_is_fetched_in_the_variant_and_in_one_format(hub: Hub, tiny_sd15_checkpoint: Path) -> None:
    folder = shutil.copytree(tiny_sd15_checkpoint, hub.folder / "folder")
    in_every_kind(folder)
    shutil.copytree(folder / "vae", hub.repository("vae"))
    opened = open_checkpoint(folder, vae="org/vae", variant="fp16")
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in opened.files
    assert hub.fetched == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_repository_without_a_vae_is_told(hub: Hub, tiny_sd15_checkpoint: Path, variant: str | None) -> None:
    hub.repository("other").mkdir()
    with pytest.raises(CheckpointError, match="org/other has no weights for vae, on the hub or in the local cache"):
        open_checkpoint(tiny_sd15_checkpoint, vae="org/other", variant=variant)


def test_a_transfer_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadError(Exception):
        """What HTTP clients raise: an exception of their own, which may say nothing."""

    def broken(*_: Any, **__: Any) -> str:
        raise ReadError

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    message = r"^org/model cannot be fetched from the hub \(ReadError\): run it again$"
    with pytest.raises(CheckpointError, match=message):
        download("org/model", None, ["model_index.json"])


@pytest.mark.parametrize(
    "write",
    [
        tiny.sdxl,
        tiny_transformers.sd3,
        tiny_flux.flux,
        tiny_flux.klein,
        tiny_flux.flux2_dev,
        tiny_transformers.z_image,
    ],
    ids=lambda write: write.__name__,
)
def test_what_is_fetched_of_a_family_is_all_that_is_read_of_it(hub: Hub, write: Callable[[Path], Path]) -> None:
    sources: list[str | Path] = [write(hub.repository("other")), "org/other"]
    tokens: list[Any] = []
    for source in sources:
        opened = open_checkpoint(source)
        family = family_named(opened.family)
        family.check(opened)
        (folder := hub.folder / str(len(tokens))).mkdir()
        written = write_tokenizers(family, opened, folder)
        tokens.append((written, {file.name: file.read_bytes() for file in folder.iterdir()}))
    assert tokens[0] == tokens[1]
