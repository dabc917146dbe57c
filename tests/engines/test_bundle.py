from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle, GraphInfo, TensorInfo, describe_files, reader, write_manifest
from latentrt.engines.errors import BundleError
from latentrt.engines.files import sha256_of

from .small_bundles import manifest_of


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "denoiser.onnx").write_bytes(b"graph")
    (folder / "denoiser.onnx.data").write_bytes(b"weights")
    tensor = TensorInfo(name="x", dtype="float32", shape=("B", 4))
    graph = GraphInfo(
        name="denoiser",
        stage="step",
        files=("denoiser.onnx", "denoiser.onnx.data"),
        inputs=(tensor,),
        outputs=(tensor.model_copy(update={"name": "y"}),),
        opset=20,
    )
    write_manifest(folder, manifest_of(folder, graph, _class_name="DDIMScheduler"))
    return folder


def edit(bundle: Path, change: Any) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_a_good_bundle_opens_and_checks(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.problems() == {}
    assert opened.file("denoiser.onnx").read_bytes() == b"graph"
    assert opened.has_graph("denoiser") and not opened.has_graph("decoder")


def test_an_infinite_scheduler_option_survives(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -float("inf")}
    write_manifest(bundle, manifest.model_copy(update={"scheduler": scheduler}))
    assert Bundle.open(bundle).manifest.scheduler == scheduler


def test_the_digest_follows_every_file_of_the_graph(bundle: Path) -> None:
    before = Bundle.open(bundle)
    (bundle / "denoiser.onnx.data").write_bytes(b"WEIGHTS")
    edit(bundle, lambda m: m["files"].update(json.loads(json.dumps(_described(bundle)))))
    after = Bundle.open(bundle)
    assert before.digest(before.graph("denoiser")) != after.digest(after.graph("denoiser"))


TOKENIZER = {"file": "denoiser.onnx", "max_length": 77, "bos_id": 1, "eos_id": 2, "pad_id": 2}


def _described(folder: Path) -> dict[str, Any]:
    return {name: info.model_dump() for name, info in describe_files(folder).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format version 99"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.pop("scheduler"), "not valid at scheduler"),
        (lambda m: m.update(surprise=1), "not valid at surprise"),
        (lambda m: m["files"].update({"../evil": m["files"]["denoiser.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["denoiser.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"C:evil": m["files"]["denoiser.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"a\\b": m["files"]["denoiser.onnx"]}), "leaves the bundle"),
        (lambda m: m["files"].update({"a//b": m["files"]["denoiser.onnx"]}), "not every system takes"),
        (lambda m: m["files"].update({"./b": m["files"]["denoiser.onnx"]}), "not every system takes"),
        (lambda m: m["files"].update({"a\nb": m["files"]["denoiser.onnx"]}), "not every system takes"),
        (lambda m: m["files"].update({"a" * 300: m["files"]["denoiser.onnx"]}), "not every system takes"),
        (lambda m: m["files"].pop("denoiser.onnx.data"), "has no hash"),
        (lambda m: m["graphs"][0].update(name="../../victim/escaped"), "not valid at graphs.0.name"),
        (lambda m: m["graphs"][0].update(name="x" * 33), "not valid at graphs.0.name"),
        (lambda m: m["graphs"][0].update(name="Denoiser"), "not valid at graphs.0.name"),
        (lambda m: m["graphs"][0]["inputs"][0].update(name="a/b"), "not valid at graphs.0.inputs.0.name"),
        (lambda m: m["graphs"][0]["inputs"][0].update(name="é"), "not valid at graphs.0.inputs.0.name"),
        (lambda m: m["graphs"][0]["inputs"][0].update(name="y"), "have one name"),
        (lambda m: m["graphs"][0]["inputs"][0].update(shape=[-1]), "not valid at graphs.0.inputs.0.shape"),
        (lambda m: m["graphs"][0]["inputs"][0].update(shape=[2**40]), "not valid at graphs.0.inputs.0.shape"),
        (lambda m: m["graphs"][0]["inputs"][0].update(shape=["a" * 99]), "not valid at graphs.0.inputs.0.shape"),
        (lambda m: m["graphs"][0]["inputs"][0].update(shape=[1] * 9), "not valid at graphs.0.inputs.0.shape"),
        (lambda m: m["graphs"][0].update(opset=10**6), "not valid at graphs.0.opset"),
        (lambda m: m["latent"].update(channels=10**6), "not valid at latent.channels"),
        (lambda m: m["latent"].update(downscale=10**6), "not valid at latent.downscale"),
        (lambda m: m["latent"].update(default_width=10**6), "not valid at latent.default_width"),
        (lambda m: m.update(default_num_inference_steps=10**9), "not valid at default_num_inference_steps"),
        (lambda m: m.update(default_guidance_scale=-1), "not valid at default_guidance_scale"),
        (lambda m: m.update(tokenizers=[{**TOKENIZER, "output": "a b"}]), "not valid at tokenizers.0.output"),
        (lambda m: m.update(tokenizers=[{**TOKENIZER, "bos_id": 2**40}]), "not valid at tokenizers.0.bos_id"),
        (lambda m: m.update(tokenizers=[{**TOKENIZER, "max_length": 10**9}]), "not valid at tokenizers.0.max_length"),
        (lambda m: m.update(masked_input="y"), "no graph 'denoiser' reads 'y'"),
        (lambda m: m.update(masked_input="x"), "no graph 'image_encoder' reads 'kept'"),
        (lambda m: m.update(source={"x": 2**63}), "more than 64 bits"),
        (lambda m: m.update(source={"x": "x" * 70_000}), "a text of 70000 characters"),
        (lambda m: m["graphs"].append(m["graphs"][0]), "one name"),
        (lambda m: m["files"]["denoiser.onnx"].update(sha256="00"), "sha256"),
    ],
)
def test_a_bad_manifest_is_refused_in_one_line(bundle: Path, change: Any, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_broken_json_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)
    (bundle / "manifest.json").write_text("[")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.open(bundle)


def test_changed_missing_and_linked_files_are_found(bundle: Path, tmp_path: Path) -> None:
    (bundle / "denoiser.onnx").write_bytes(b"GRAPH")
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(bundle).file("denoiser.onnx")
    (bundle / "denoiser.onnx").write_bytes(b"longer than before")
    with pytest.raises(BundleError, match="bytes where the manifest says"):
        Bundle.open(bundle).file("denoiser.onnx")
    (bundle / "denoiser.onnx").unlink()
    assert Bundle.open(bundle).problems() == {"denoiser.onnx": "is missing"}
    (tmp_path / "outside").write_bytes(b"graph")
    (bundle / "denoiser.onnx").symlink_to(tmp_path / "outside")  # as the hub's cache keeps files
    assert Bundle.open(bundle).file("denoiser.onnx").read_bytes() == b"graph"
    (tmp_path / "outside").write_bytes(b"shame")
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(bundle).file("denoiser.onnx")


def test_a_file_is_hashed_once_and_again_when_it_was_changed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(reader, "sha256_of", noted)
    opened, file = Bundle.open(bundle), bundle / "denoiser.onnx"
    for _ in range(3):
        assert opened.file("denoiser.onnx").read_bytes() == b"graph"
    assert hashed == [file]
    times = file.stat()
    file.write_bytes(b"GRAPH")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # which copying tools restore
    with pytest.raises(BundleError, match="SHA-256"):
        opened.file("denoiser.onnx")
    file.write_bytes(b"graph")
    assert opened.file("denoiser.onnx") == file and len(hashed) == 3


def test_an_unknown_graph_is_named(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graph 'decoder': it has denoiser"):
        Bundle.open(bundle).graph("decoder")


def test_a_bundle_stays_where_it_was_opened(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    opened = Bundle.open("bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened.file("denoiser.onnx").read_bytes() == b"graph"


def test_a_folder_that_cannot_be_read_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(BundleError, match=r"cannot be read.*Permission denied"):
        Bundle.open(bundle)
