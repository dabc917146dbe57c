from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle, GraphInfo, TensorInfo, atomic_folder, describe_files, write_manifest
from latentrt.engines.errors import BundleError, StorageError

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
        outputs=(tensor,),
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
        (lambda m: m["files"].pop("denoiser.onnx.data"), "has no hash"),
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
    (bundle / "denoiser.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle).file("denoiser.onnx")


def test_an_unknown_graph_is_named(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graph 'decoder': it has denoiser"):
        Bundle.open(bundle).graph("decoder")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "manifest.json").write_text("1")
    assert (target / "manifest.json").read_text() == "1" and list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_kept_unless_replacing_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "manifest.json").write_text("1")
    with pytest.raises(StorageError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True):
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "1"
    with atomic_folder(target, replace=True) as folder:
        (folder / "manifest.json").write_text("2")
    assert (target / "manifest.json").read_text() == "2" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    with pytest.raises(StorageError, match="is no bundle"), atomic_folder(tmp_path / "photos", replace=True):
        pass
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
