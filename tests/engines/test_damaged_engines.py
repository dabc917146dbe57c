"""Engines in the cache that are not as they were built: truncated, zero-filled, flipped, foreign, half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.cache import CHECKED, SIDECAR, EngineCache
from latentrt.engines.errors import EngineError, StorageError
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.engines.tensorrt.plan import profile_for
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run

from .simulated_backends import tensorrt_backend
from .small_bundles import linear_bundle

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 1, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a cache with the embedded model's engines, and the picture that they draw."""
    root = tmp_path_factory.mktemp("filled") / "engines"
    return root, draw(root)


@pytest.fixture
def root(filled: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the cache in which everything is as it was, inodes aside."""
    return shutil.copytree(filled[0], tmp_path / "engines")


def draw(root: Path) -> Any:
    with Pipeline.open(BUNDLE, "onnxruntime-cpu", threads=1, cache=EngineCache(root)) as pipe:
        return np.asarray(pipe(**REQUEST).images[0])


def denoiser(root: Path) -> Path:
    (folder,) = root.glob("denoiser-*")
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 3, len(data), len(data) // 50):
        data[place] ^= 0x5A
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": flip,
    "gone": Path.unlink,
}


def test_a_copied_cache_is_used(root: Path, filled: tuple[Path, Any]) -> None:
    built = (denoiser(root) / "model.onnx").stat().st_mtime_ns
    assert draw(root).tobytes() == filled[1].tobytes()
    assert (denoiser(root) / "model.onnx").stat().st_mtime_ns == built


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", SIDECAR])
def test_a_damaged_engine_is_built_again(root: Path, filled: tuple[Path, Any], name: str, damage: str) -> None:
    DAMAGE[damage](denoiser(root) / name)
    assert draw(root).tobytes() == filled[1].tobytes()
    assert EngineCache(root).verify() == {}


@pytest.mark.parametrize("damage", ["empty", "zeros", "flipped", "gone"])
def test_the_note_of_the_last_check_may_be_damaged(root: Path, filled: tuple[Path, Any], damage: str) -> None:
    DAMAGE[damage](denoiser(root) / CHECKED)
    assert draw(root).tobytes() == filled[1].tobytes()
    assert json.loads((denoiser(root) / CHECKED).read_text())


def test_files_are_hashed_once_and_not_at_every_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrt.engines import cache

    draw(root)
    hashed: list[str] = []
    ordinary = cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda file: (hashed.append(file.name), ordinary(file))[1])
    draw(root)
    assert hashed == []
    os.utime(denoiser(root) / "model.onnx.data")
    draw(root)
    assert sorted(hashed) == ["model.onnx", "model.onnx.data"]


def test_damage_that_keeps_size_and_time_is_found_on_request(
    root: Path, filled: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = denoiser(root) / "model.onnx.data"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"damage")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setenv("LATENTRT_HOME", str(root.parent))
    assert run(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert "model.onnx.data has other contents than when it was built; removed" in out
    assert run(["cache", "verify"]) == 0
    assert draw(root).tobytes() == filled[1].tobytes()


def test_the_remains_of_a_killed_build_do_not_keep_a_damaged_engine(root: Path, filled: tuple[Path, Any]) -> None:
    folder = denoiser(root)
    flip(folder / "model.onnx.data")
    left = root / ".building" / folder.name
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    assert list(EngineCache(root).verify()) == [folder]
    assert not folder.exists() and not left.exists()
    assert EngineCache(root).remove({"folder": folder})  # gone already: nothing to do, and no error
    assert draw(root).tobytes() == filled[1].tobytes()


def test_an_engine_that_does_not_load_is_built_once_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, failures = OnnxRuntimeCpu._session, [True]

    def failing(self: Any, folder: Path, graph: Any) -> Any:
        if graph.name == "decoder" and failures:
            if not always:
                failures.clear()
            raise EngineError("it does not load")
        return ordinary(self, folder, graph)

    monkeypatch.setattr(OnnxRuntimeCpu, "_session", failing)
    always = False
    draw(root)
    failures.append(True)
    always = True
    with pytest.raises(EngineError, match="it does not load"):
        draw(root)


def test_a_build_that_fails_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def failing(self: Any, bundle: Any, graph: Any, out: Path) -> Any:
        built.append(graph.name)
        raise EngineError("it cannot be built")

    monkeypatch.setattr(OnnxRuntimeCpu, "_build", failing)
    with pytest.raises(EngineError, match="it cannot be built"):
        draw(tmp_path / "engines")
    assert len(built) == 1


def test_a_damaged_plan_for_many_shapes_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = linear_bundle(tmp_path / "bundle")
    graph, shapes = bundle.graph("first"), {"x": (3, 8)}
    planner = tensorrt_backend(monkeypatch, EngineCache(tmp_path / "engines")).planner
    dynamic = planner.build(bundle, graph, profile_for(graph, {"x": (2, 8)}, {"x": (4, 8)}))
    assert planner.plan(bundle, graph, shapes, build=False).folder == dynamic.folder
    dynamic.path.write_bytes(bytes(dynamic.path.stat().st_size))
    with pytest.raises(EngineError, match="Build it with"):
        planner.plan(bundle, graph, shapes, build=False)
    assert planner.plan(bundle, graph, shapes).folder != dynamic.folder


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners are POSIX's")
def test_what_others_may_have_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in (0o777, 0o1777):
        root.chmod(mode)
        with pytest.raises(StorageError, match="can be written by everybody: run chmod o-w"):
            draw(root)
    root.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    if root.stat().st_uid == 0:  # what root has written may be used by all
        draw(root)
        os.chown(denoiser(root), 1234, -1)
    with pytest.raises(StorageError, match=r"belongs to user \d+, and this is 4321: set LATENTRT_HOME"):
        draw(root)


BUILD = """
import sys
from pathlib import Path
from latentrt.engines.cache import EngineCache
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.runtime import Bundle
bundle = Bundle.open(sys.argv[1])
backend = OnnxRuntimeCpu(cache=EngineCache(Path(sys.argv[2])), threads=1)
print("building", flush=True)
for graph in bundle.manifest.graphs:
    backend.open(bundle, graph).close()
"""


def test_a_build_that_is_killed_at_any_moment_harms_nothing(tmp_path: Path, filled: tuple[Path, Any]) -> None:
    root = tmp_path / "engines"
    for delay in (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(BUNDLE), str(root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
    assert draw(root).tobytes() == filled[1].tobytes()
    assert EngineCache(root).verify() == {}
