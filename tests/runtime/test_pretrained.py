"""What programs written for diffusers do beside the call: from_pretrained, to, switches, another scheduler."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.errors import MissingExtraError, RequestError
from latentrt.runtime import Pipeline

QUICK: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "seed": 1}
ON: dict[str, Any] = {"backend": "onnxruntime-cpu", "threads": 1}


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_pretrained(tiny_sd15_bundle, safety_checker=None, torch_dtype="float32", **ON) as pipe:
        yield pipe


@pytest.fixture
def exports(tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Take the tiny bundle for what an export makes, and note every export."""
    from latentrt.export import cached

    made: list[dict[str, Any]] = []

    def export(source: Any, out: Path, **options: Any) -> None:
        made.append(options)
        shutil.copytree(tiny_sd15_bundle, out)

    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cached, "export_checkpoint", export)
    return made


def test_a_checkpoint_is_exported_at_its_first_use_only(
    tiny_sd15_checkpoint: Path, exports: list[dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mine"
    shutil.copytree(tiny_sd15_checkpoint, checkpoint)
    stages: list[str] = []

    def opened(**named: Any) -> int:
        with Pipeline.from_pretrained(checkpoint, progress=lambda *said: stages.append(said[0]), **ON, **named) as pipe:
            assert pipe.bundle.path.parent == tmp_path / "home" / "bundles"
        return len(exports)

    assert [opened(), opened()] == [1, 1]
    assert opened(torch_dtype=np.float16) == 2 and exports[-1]["precision"] == "fp16"
    assert opened(variant="ema") == 3 and exports[-1]["variant"] == "ema"
    os.utime(checkpoint / "model_index.json", (1, 1))
    assert [opened(), opened()] == [4, 4]


@pytest.mark.parametrize(("kind", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32")])
def test_a_precision_that_is_auto_is_that_of_the_weights(
    tiny_sd15_checkpoint: Path, exports: list[dict[str, Any]], tmp_path: Path, kind: str, precision: str
) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    checkpoint = shutil.copytree(tiny_sd15_checkpoint, tmp_path / "mine")
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor.to(getattr(torch, kind)) for name, tensor in safetensors.load_file(file).items()}
    file.unlink()
    safetensors.save_file(weights, file)
    Pipeline.from_pretrained(checkpoint, torch_dtype="auto", **ON).close()
    assert exports[-1]["precision"] == precision


def test_the_weights_that_auto_is_of_are_the_denoiser_s_own(
    tiny_sd15_checkpoint: Path, exports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A single file begins with other tensors, which may be of another type; files are read once."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    from latentrt.export import cached

    from ..export.original_files import original_tensors

    tensors = {name: each.half() for name, each in original_tensors(tiny_sd15_checkpoint, 1).items()}
    file = tmp_path / "model.safetensors"
    safetensors.save_file(tensors | {"alphas_cumprod": torch.ones(1000)}, file)
    named: dict[str, Any] = {"torch_dtype": "auto", "tokenizer": tiny_sd15_checkpoint, **ON}
    Pipeline.from_pretrained(file, **named).close()
    assert exports[-1]["precision"] == "fp16"
    monkeypatch.setattr(cached, "own_precision", None)
    Pipeline.from_pretrained(file, **named).close()
    assert len(exports) == 1


@pytest.mark.parametrize("name", ["transformer", "denoiser"])
def test_a_family_s_own_name_of_its_denoiser_is_the_one_that_auto_reads(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from types import SimpleNamespace

    torch = pytest.importorskip("torch")
    from latentrt.export import cached, families
    from latentrt.export.checkpoints import sources

    other, own = (SimpleNamespace(dtype=lambda kind=kind: kind) for kind in (torch.float32, torch.bfloat16))
    opened = SimpleNamespace(components={"vae": other, name: own}, family="some", close=lambda: None)
    monkeypatch.setattr(sources, "open_checkpoint", lambda *_: opened)
    monkeypatch.setattr(families, "family_named", lambda _: SimpleNamespace(denoiser=name))
    assert cached.own_precision("some", None, {}) == "bf16"


def test_a_base_of_the_hub_is_that_of_its_commit(
    exports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from latentrt.export.checkpoints import hub

    file, asked = tmp_path / "denoiser.safetensors", []
    file.write_bytes(b"")

    def download(repository: str, revision: str | None, _: list[str]) -> Path:
        asked.append((repository, revision))
        return tmp_path / commits[-1]

    monkeypatch.setattr(hub, "download", download)
    given: dict[str, Any] = {"base": "some/model", "num_inference_steps": 4, "guidance_scale": 0.0, **ON}
    commits = ["a" * 40]
    for _ in range(2):
        Pipeline.from_pretrained(file, **given).close()
    assert len(exports) == 1 and asked == [("some/model", None)] * 2
    wanted = {"base": "some/model", "revision": commits[0], "num_inference_steps": 4, "guidance_scale": 0.0}
    assert {name: exports[0][name] for name in wanted} == wanted
    for name in ("base", "vae", "tokenizer"):
        before = len(exports)
        for letter in "bc":
            commits.append(letter * 40)
            Pipeline.from_pretrained(file, **{name: "some/other"}, **ON).close()
        assert len(exports) == before + 2
    Pipeline.from_pretrained(file, **given | {"num_inference_steps": 8, "revision": "main"}).close()
    assert exports[-1]["num_inference_steps"] == 8 and asked[-1] == ("some/model", "main")


def test_a_hub_id_is_exported_at_the_commit_that_it_stands_for(
    exports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from latentrt.export.checkpoints import hub

    commit = "a" * 40
    monkeypatch.setattr(hub, "download", lambda *_: tmp_path / commit)
    for _ in range(2):
        Pipeline.from_pretrained("some/model", **ON).close()
    assert [each["revision"] for each in exports] == [commit]
    commit = "b" * 40
    Pipeline.from_pretrained("some/model", **ON).close()
    assert [each["revision"] for each in exports] == ["a" * 40, commit]


def test_of_two_that_want_a_checkpoint_one_exports_it(
    tiny_sd15_checkpoint: Path, exports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.export import cached

    looked, export = threading.Barrier(2), cached.export_checkpoint
    is_file = Path.is_file
    first = threading.local()

    def together(path: Path) -> bool:
        found = is_file(path)
        if path.name == "manifest.json" and not getattr(first, "done", False):
            first.done = True
            looked.wait(30)  # both have seen that there is none
        return found

    monkeypatch.setattr(Path, "is_file", together)
    threads = [threading.Thread(target=cached.cached_bundle, args=(tiny_sd15_checkpoint,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exports) == 1 and export is cached.export_checkpoint


def test_without_the_extra_bundles_open_and_checkpoints_say_what_to_install(
    tiny_sd15_bundle: Path, tiny_sd15_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "latentrt.export.cached", None)
    Pipeline.from_pretrained(tiny_sd15_bundle, **ON).close()
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[export\]'"):
        Pipeline.from_pretrained(tiny_sd15_checkpoint, **ON)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"safety_checker": object()},
            "safety_checker is not supported: bundles hold none, and pictures are not checked",
        ),
        ({"device_map": "auto"}, "device_map is not supported: choose with backend="),
        ({"unet": object()}, "unet cannot be given"),
        ({"vae": object()}, "vae is a object: give a name, a folder or a hub id"),
        ({"num_inference_steps": "4"}, "num_inference_steps is a str: give a number"),
        ({"base": 4}, "base is a int: give a name, a folder or a hub id"),
        ({"guidance_scale": 0.0}, "guidance_scale is for checkpoints"),
        ({"torch_dtype": "torch.float64"}, "torch_dtype is float64: a bundle is float32, float16 or bfloat16"),
        ({"torch_dtype": np.float16}, "is fp32: export the checkpoint in fp16"),
        ({"revision": "main"}, "revision is for checkpoints"),
    ],
    ids=str,
)
def test_keywords_that_cannot_be_served_are_named(tiny_sd15_bundle: Path, named: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Pipeline.from_pretrained(tiny_sd15_bundle, **ON, **named)


def test_a_pipeline_stays_where_it_is(pipe: Pipeline) -> None:
    assert pipe.to("cpu") is pipe.to(device="cpu", dtype="torch.float32") is pipe.to("cpu", "float32") is pipe
    for place, message in (("cuda:1", "cannot move to cuda:1: open it"), ("float16", "precision is chosen at export")):
        with pytest.raises(RequestError, match=message):
            pipe.to(place)


def test_switches_of_memory_are_taken_and_others_say_what_to_do(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    before: Any = pipe
    with caplog.at_level(logging.INFO, logger="latentrt"):
        before.enable_attention_slicing("max")
        before.disable_vae_tiling()
        before.set_progress_bar_config(disable=True)
    assert [record.message.split()[0] for record in caplog.records] == [
        "enable_attention_slicing",
        "disable_vae_tiling",
    ]
    for name, message in (
        ("load_lora_weights", "fuse_lora"),
        ("unet", "graphs, not modules"),
        ("no_such_thing", "no attribute 'no_such_thing'"),
    ):
        with pytest.raises(AttributeError, match=message):
            getattr(before, name)


def test_another_scheduler_is_that_of_the_requests_that_follow(pipe: Pipeline) -> None:
    diffusers = pytest.importorskip("diffusers")
    own = pipe.scheduler
    default = pipe("a star", **QUICK).images
    wanted = pipe("a star", sampler="dpmpp_2m_karras", **QUICK).images
    cls = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = cls.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert np.array_equal(pipe("a star", **QUICK).images, wanted) and not np.array_equal(wanted, default)
    for wrong, message in (("ddim", "scheduler is a str"), (diffusers.VQDiffusionScheduler(8), "cannot be used")):
        with pytest.raises(RequestError, match=message):
            pipe.scheduler = wrong
    assert np.array_equal(pipe("a star", **QUICK).images, wanted)
    pipe.scheduler = own
    assert np.array_equal(pipe("a star", **QUICK).images, default)
