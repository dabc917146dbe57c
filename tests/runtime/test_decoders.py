"""A tiny decoder beside the checkpoint's own, and pictures in tiles, against diffusers' own autoencoders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.quality.scenes import draw, held_out_scenes
from latentrt.engines.cache import EngineCache
from latentrt.engines.device import Array
from latentrt.engines.errors import BundleError, CheckpointError, RequestError, UnsupportedModelError
from latentrt.engines.tensorrt import backend as tensorrt
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.batcher.encode import Encoder
from latentrt.runtime.batcher.events import Previewed
from latentrt.runtime.cli import run
from latentrt.runtime.loop.decoding import decoded_in_tiles
from PIL import Image

from ..engines.simulated_backends import tensorrt_backend

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from latentrt.export import embedded, export_checkpoint  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.checkpoints.vae import with_tiny_decoder  # noqa: E402
from latentrt.export.families import family_named  # noqa: E402
from latentrt.export.networks.autoencoder import Decoder  # noqa: E402
from latentrt.export.verify import check_source  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LARGEST = 2 / 255
"""How far a pixel may be off."""
QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "np"}
WIDE: dict[str, Any] = {**QUICK, "height": 64, "width": 800}
"""Four tiles of 64 cells from left to right."""


def tiny(folder: Path, **options: Any) -> Path:
    """Write a tiny autoencoder with random weights, whose pictures are neither black nor white."""
    torch.manual_seed(1)
    levels = {f"{half}_block_out_channels": (8,) * 3 for half in ("encoder", "decoder")}
    levels |= {f"num_{half}_blocks": (1,) * 3 for half in ("encoder", "decoder")}
    network = diffusers.AutoencoderTiny(**levels, **{"scaling_factor": 0.7, **options})
    with torch.no_grad():
        network.decoder.layers[-1].weight.mul_(8)
        network.decoder.layers[-1].bias.fill_(0.5)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("taesd") / "tiny-autoencoder")


@pytest.fixture(scope="module")
def bundle(tiny_sd15_checkpoint: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("with-tiny-decoder") / "bundle"
    return export_checkpoint(tiny_sd15_checkpoint, out, tiny_decoder=autoencoder)


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@torch.no_grad()
def decoded(folder: Path, latents: Array, kind: str = "AutoencoderTiny") -> Array:
    """Return the pictures [B, H, W, 3] that diffusers' own autoencoder makes of a pipeline's latents."""
    network = getattr(diffusers, kind).from_pretrained(folder)
    sample = network.decode(torch.from_numpy(latents) / network.config.scaling_factor).sample
    pixels: Array = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pixels


def test_the_tiny_decoder_is_that_of_diffusers_pipeline(
    pipe: Pipeline, tiny_sd15_checkpoint: Path, autoencoder: Path
) -> None:
    network = diffusers.AutoencoderTiny.from_pretrained(autoencoder)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_sd15_checkpoint, vae=network, safety_checker=None
    )
    reference.set_progress_bar_config(disable=True)
    for request in (QUICK, {**QUICK, "height": 64, "width": 96, "num_images_per_prompt": 2}):
        generators = [torch.Generator().manual_seed(5 + i) for i in range(request.get("num_images_per_prompt", 1))]
        wanted = reference(**request, generator=generators).images
        found = pipe(**request, seed=5, decoder="tiny")
        assert np.std(wanted) > 0.05 and np.abs(found.images - wanted).max() <= LARGEST
        assert found.request is not None and found.request.decoder == "tiny"
        assert np.abs(pipe(**request, seed=5).images - wanted).max() > 10 * LARGEST  # the other one is the default


def test_scale_and_shift_of_latents_are_the_tiny_decoders_own() -> None:
    """As in diffusers' pipelines of families whose latents are shifted."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderTiny(latent_channels=16, scaling_factor=0.36, shift_factor=0.12).eval()
    latents = torch.randn(1, 16, 4, 5)
    with torch.no_grad():
        wanted = diffusers.image_processor.VaeImageProcessor().postprocess(
            network.decode(latents / network.config.scaling_factor + network.config.shift_factor).sample, "np"
        )
        np.testing.assert_allclose(Decoder(network)(latents)[1], wanted, rtol=0, atol=1e-6)


def test_the_manifest_tells_the_tiny_decoder_and_where_it_comes_from(
    bundle: Path, tiny_sd15_checkpoint: Path, autoencoder: Path
) -> None:
    opened = Bundle.open(bundle)
    graph, source = opened.graph("tiny_decoder"), opened.manifest.source
    assert graph.parity is not None and graph.parity.relative_error < 1e-4 and len(graph.references) == 2
    assert graph.inputs == opened.graph("decoder").inputs and graph.outputs == opened.graph("decoder").outputs
    assert source["tiny_decoder"] == {"name": autoencoder.name, "revision": None}
    assert "tiny_decoder/diffusion_pytorch_model.safetensors" in source["files"]
    checkpoint = open_checkpoint(tiny_sd15_checkpoint)
    with pytest.raises(BundleError, match="give the same with --tiny-decoder"):
        check_source(opened, checkpoint)
    check_source(opened, with_tiny_decoder(checkpoint, autoencoder, None, opened.manifest.latent))


@pytest.mark.long
def test_a_bundle_with_a_tiny_decoder_verifies(
    bundle: Path, tiny_sd15_checkpoint: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--against", str(tiny_sd15_checkpoint), "--tiny-decoder", str(autoencoder), "--steps", "2", "--json"]
    assert run(["verify", str(bundle), *arguments]) == 0
    compared = {each["tensor"] for each in json.loads(capsys.readouterr().out)["tensors"]}
    assert {"tiny_decoder.image", "tiny_decoder.pixels"} <= compared


def test_what_is_no_tiny_decoder_of_these_latents_is_refused(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_sd15_checkpoint)
    latent = family_named(checkpoint.family).latent(checkpoint)
    for source, kind, said in (
        (
            tiny(tmp_path / "other", latent_channels=16),
            UnsupportedModelError,
            "latents of 16 channels and 4 pixels a cell",
        ),
        (tiny_sd15_checkpoint / "vae", CheckpointError, "'AutoencoderKL': give an AutoencoderTiny"),
        (tmp_path / "nothing", CheckpointError, "does not exist: give a diffusers folder or a hub id"),
        (Path(__file__), CheckpointError, "is a file: give a diffusers folder or a hub id"),
    ):
        with pytest.raises(kind, match=said):
            with_tiny_decoder(checkpoint, source, None, latent)


def test_a_bundle_without_a_tiny_decoder_says_so(
    tiny_sd15_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    request = ["generate", "a", "-b", str(tiny_sd15_bundle), "-o", str(tmp_path / "a.png")]
    assert run([*request, "--decoder", "tiny"]) == 2
    line = capsys.readouterr().err
    assert "--decoder is 'tiny'" in line and line.rstrip().endswith("with --tiny-decoder") and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tiles_of_a_decoder_without_norms_are_the_picture(pipe: Pipeline) -> None:
    whole, tiled = (pipe(**WIDE, seed=3, decoder="tiny", tiled=choice) for choice in (None, True))
    assert np.abs(whole.images - tiled.images).max() <= LARGEST and tiled.timings.decode > 0
    assert not whole.warnings and not tiled.warnings
    again = pipe(**{**WIDE, "output_type": "pil"}, seed=3, decoder="tiny", tiled=True, num_images_per_prompt=2)
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.rint(tiled.images[0] * 255))
    assert again.images[0] != again.images[1]


def test_a_tile_is_what_diffusers_makes_of_its_latents(pipe: Pipeline, tiny_sd15_checkpoint: Path) -> None:
    """Where it is alone: norms take what they need from a tile in place of the picture."""
    latents = pipe(**{**WIDE, "output_type": "latent"}, seed=3).images
    pixels = pipe(**WIDE, seed=3, tiled=True).images
    for part, alone in ((latents[..., :64], slice(0, 200)), (latents[..., -64:], slice(-200, None))):
        wanted = decoded(tiny_sd15_checkpoint / "vae", part, "AutoencoderKL")[:, :, alone]
        assert np.abs(pixels[:, :, alone] - wanted).max() <= LARGEST


class Remembering(torch.nn.Module):  # type: ignore[misc]
    """A group norm that keeps the mean and deviation of the first picture that it sees."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.seen = norm, None

    def forward(self, x: Any) -> Any:
        grouped = x.unflatten(1, (self.norm.num_groups, -1))
        if self.seen is None:
            over = (2, *range(3, grouped.ndim))
            self.seen = grouped.mean(over, keepdim=True), grouped.var(over, keepdim=True, unbiased=False)
        mean, variance = self.seen
        weight, bias = (each[:, None, None] for each in (self.norm.weight, self.norm.bias))
        return ((grouped - mean) / (variance + self.norm.eps).sqrt()).flatten(1, 2) * weight + bias


@pytest.mark.long
@torch.no_grad()
def test_what_tiles_of_a_trained_decoder_differ_by_is_its_norms() -> None:
    """The embedded model's: one scene drawn large, in two tiles, as it is and with the norms of the whole picture."""
    vae = diffusers.AutoencoderKL.from_pretrained(embedded.CHECKPOINT / "vae").eval()
    scene = Image.fromarray(draw([held_out_scenes("pair", 1)[0]])[0]).resize((896, 512), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(scene).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mean.numpy()

    def decode(part: Array) -> dict[str, Array]:
        found = (vae.decode(torch.from_numpy(part)).sample / 2 + 0.5).clamp(0, 1)
        return {"pixels": found.permute(0, 2, 3, 1).contiguous().numpy()}

    def difference() -> Array:
        found: Array = np.abs(decoded_in_tiles(latents, (64, 64), decode)["pixels"] - whole)
        return found * 255

    whole = decode(latents)["pixels"]
    own = difference()
    assert own.mean() <= 0.6 and np.percentile(own, 99) <= 2
    for parent in list(vae.decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, Remembering(child))
    np.testing.assert_allclose(decode(latents)["pixels"], whole, rtol=0, atol=1e-4)
    assert difference().max() <= 2


def test_a_request_in_tiles_opens_no_decoder_of_the_whole_picture(pipe: Pipeline) -> None:
    workspace = next(each for each in pipe.session._workspaces.values() if each.decoding.tile)
    assert not workspace.pictures
    assert pipe(**QUICK, seed=1, tiled=True).warnings == ["tiled is given: 32x32 fits in one tile, it changes nothing"]


def test_low_memory_opens_a_decoder_once_for_all_tiles(bundle: Path, pipe: Pipeline) -> None:
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1, low_memory=True) as careful:
        found = careful(**WIDE, seed=3, decoder="tiny", tiled=True).images
        assert not careful.session.open_graphs
    np.testing.assert_array_equal(found, pipe(**WIDE, seed=3, decoder="tiny", tiled=True).images)


def test_a_batcher_decodes_as_each_request_asks(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{}, {"decoder": "tiny"}, {"tiled": True}, {"decoder": "tiny", "tiled": True}]
    with Batcher(pipe, slots=2) as batcher:
        futures = [batcher.submit(**WIDE, seed=3, **options) for options in asked]
        for options, future in zip(asked, futures, strict=True):
            assert np.abs(future.result(120).images - pipe(**WIDE, seed=3, **options).images).max() <= LARGEST
        with pytest.raises(RequestError, match="decoder is 'small'"):
            batcher.submit(**WIDE, decoder="small")


def test_previews_come_from_the_tiny_decoder(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, events = list[str](), list[Any]()
    run_graph = Encoder.run
    monkeypatch.setattr(
        Encoder, "run", lambda self, graph, inputs: (ran.append(graph.name), run_graph(self, graph, inputs))[1]
    )
    with Batcher(pipe, slots=1) as batcher:
        batcher.submit(**{**QUICK, "num_inference_steps": 4}, previews=1, on_event=events.append).result(120)
    assert [name for name in ran if "decoder" in name] == ["tiny_decoder", "decoder"]
    (preview,) = [event for event in events if isinstance(event, Previewed)]
    assert preview.picture.size == (32, 32)


def test_previews_of_a_batcher_that_is_warm_build_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "accept", lambda *_: None)  # has tests of its own
    cache, events = EngineCache(tmp_path), list[Any]()
    backend = tensorrt_backend(monkeypatch, cache)
    with Pipeline(Bundle.open(bundle), backend) as pipe, Batcher(pipe, slots=1, build=False) as batcher:
        batcher.warm_up([(32, 32)])
        plans = len(list(cache.entries()))
        batcher.submit(**QUICK, height=32, width=32, previews=1, on_event=events.append).result(120)
        assert [event for event in events if isinstance(event, Previewed)]
        assert len(list(cache.entries())) == plans
        batcher.warm_up([(40, 32)], pictures=False)
        wider = {**QUICK, "height": 32, "width": 40}
        with pytest.raises(RequestError, match="no tensorrt plan of tiny_decoder"):
            batcher.submit(**wider, previews=1, on_event=events.append)
        assert batcher.submit(**wider).result(120)


def test_a_callback_shows_latents_by_the_decoder_that_it_names(pipe: Pipeline, autoencoder: Path) -> None:
    latents = pipe(**{**WIDE, "output_type": "latent"}, seed=3).images
    wanted = decoded(autoencoder, latents)[0] * 255
    for options in ({}, {"tiled": True}):
        (shown,) = pipe.decode(latents, decoder="tiny", **options)
        assert isinstance(shown, Image.Image) and np.abs(np.asarray(shown, np.float32) - wanted).max() <= 2.5
    with pytest.raises(RequestError, match="choose full or tiny"):
        pipe.decode(latents, decoder="small")  # type: ignore[arg-type]
