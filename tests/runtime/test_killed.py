"""Processes that are killed at any moment: the next run is right by itself, and nothing of theirs is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from latentrt.engines.bundle import Bundle, atomic_folder
from latentrt.export.embedded import bundle_path
from latentrt.runtime.cli import run

EXPORT = """
import shutil, sys
from pathlib import Path
from latentrt.engines.bundle import atomic_folder
print("ready", flush=True)
while True:
    with atomic_folder(Path(sys.argv[2]), replace=True) as folder:
        shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True)
"""
"""Exports one bundle after the other over the same place, without the time that PyTorch takes."""

GENERATE = """
import os, pathlib, sys, time
moment = sys.argv.pop(1)
owner = os if moment in ("fsync", "link") else pathlib.Path
ordinary = getattr(owner, moment)
def stop(*arguments, **options):
    if moment == "link":
        ordinary(*arguments, **options)
    if moment == "fsync" or ".png" in str(arguments[0]):
        print("ready", flush=True)
        time.sleep(600)
    return ordinary(*arguments, **options)
setattr(owner, moment, stop)
from latentrt.runtime.cli import main
main()
"""
"""Draws a picture and stops for good at one moment of writing it."""


def kill(program: str, *arguments: object, after: float = 0.0) -> None:
    """Start a program and kill it some seconds after it has said that it is ready."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
        time.sleep(after)
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_that_is_killed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    target, seen = tmp_path / "bundle", set()
    for delay in (0.0, 0.02, 0.06, 0.13):
        kill(EXPORT, bundle_path(), target, after=delay)
        seen |= {name.rpartition(".")[2] for name in names(tmp_path)}
        with atomic_folder(target, replace=True) as folder:
            assert not target.exists() or Bundle.open(target).problems() == {}
            (folder / "manifest.json").write_bytes((bundle_path() / "manifest.json").read_bytes())
            for file in bundle_path().iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        assert names(tmp_path) == ["bundle"] and Bundle.open(target).problems() == {}
    assert "lock" in seen, "no export was killed at its work"


@pytest.mark.skipif(not hasattr(os, "link") or os.name == "nt", reason="pictures are not linked on Windows")
@pytest.mark.parametrize(("output", "moments"), [("out", ("fsync", "link")), ("one.png", ("replace",))])
def test_a_request_that_is_killed_leaves_nothing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, moments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" if output == "out" else tmp_path
    arguments = ["--quiet", "generate", "a star", "--steps", "1", "--size", "64x64", "--seed", "1", "-o", output]
    assert run(arguments) == 0
    first = next(folder.glob("*.png")).read_bytes()
    for moment in moments:
        kill(GENERATE, moment, *arguments)
        assert any(path.suffix == ".lock" for path in folder.iterdir())
        assert all(path.read_bytes() == first for path in folder.glob("[!.]*.png")), "it appeared before it was whole"
        assert run(arguments) == 0
        assert {path.suffix for path in folder.iterdir()} == {".png"}
        assert all(path.read_bytes() == first for path in folder.iterdir())
